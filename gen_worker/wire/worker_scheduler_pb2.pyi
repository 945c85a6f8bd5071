from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerSchedulerMessage(_message.Message):
    __slots__ = ("worker_registration", "run_result", "spawn_tasks", "load_model_result", "unload_model_result", "worker_event", "run_request", "load_model_cmd", "unload_model_cmd", "interrupt_run_cmd", "deployment_model_config", "realtime_open_cmd", "realtime_frame", "realtime_close_cmd")
    WORKER_REGISTRATION_FIELD_NUMBER: _ClassVar[int]
    RUN_RESULT_FIELD_NUMBER: _ClassVar[int]
    SPAWN_TASKS_FIELD_NUMBER: _ClassVar[int]
    LOAD_MODEL_RESULT_FIELD_NUMBER: _ClassVar[int]
    UNLOAD_MODEL_RESULT_FIELD_NUMBER: _ClassVar[int]
    WORKER_EVENT_FIELD_NUMBER: _ClassVar[int]
    RUN_REQUEST_FIELD_NUMBER: _ClassVar[int]
    LOAD_MODEL_CMD_FIELD_NUMBER: _ClassVar[int]
    UNLOAD_MODEL_CMD_FIELD_NUMBER: _ClassVar[int]
    INTERRUPT_RUN_CMD_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_MODEL_CONFIG_FIELD_NUMBER: _ClassVar[int]
    REALTIME_OPEN_CMD_FIELD_NUMBER: _ClassVar[int]
    REALTIME_FRAME_FIELD_NUMBER: _ClassVar[int]
    REALTIME_CLOSE_CMD_FIELD_NUMBER: _ClassVar[int]
    worker_registration: WorkerRegistration
    run_result: TaskExecutionResult
    spawn_tasks: SpawnTasksRequest
    load_model_result: LoadModelResult
    unload_model_result: UnloadModelResult
    worker_event: WorkerEvent
    run_request: TaskExecutionRequest
    load_model_cmd: LoadModelCommand
    unload_model_cmd: UnloadModelCommand
    interrupt_run_cmd: InterruptTaskCommand
    deployment_model_config: DeploymentModelConfig
    realtime_open_cmd: RealtimeOpenCommand
    realtime_frame: RealtimeFrame
    realtime_close_cmd: RealtimeCloseCommand
    def __init__(self, worker_registration: _Optional[_Union[WorkerRegistration, _Mapping]] = ..., run_result: _Optional[_Union[TaskExecutionResult, _Mapping]] = ..., spawn_tasks: _Optional[_Union[SpawnTasksRequest, _Mapping]] = ..., load_model_result: _Optional[_Union[LoadModelResult, _Mapping]] = ..., unload_model_result: _Optional[_Union[UnloadModelResult, _Mapping]] = ..., worker_event: _Optional[_Union[WorkerEvent, _Mapping]] = ..., run_request: _Optional[_Union[TaskExecutionRequest, _Mapping]] = ..., load_model_cmd: _Optional[_Union[LoadModelCommand, _Mapping]] = ..., unload_model_cmd: _Optional[_Union[UnloadModelCommand, _Mapping]] = ..., interrupt_run_cmd: _Optional[_Union[InterruptTaskCommand, _Mapping]] = ..., deployment_model_config: _Optional[_Union[DeploymentModelConfig, _Mapping]] = ..., realtime_open_cmd: _Optional[_Union[RealtimeOpenCommand, _Mapping]] = ..., realtime_frame: _Optional[_Union[RealtimeFrame, _Mapping]] = ..., realtime_close_cmd: _Optional[_Union[RealtimeCloseCommand, _Mapping]] = ...) -> None: ...

class WorkerRegistration(_message.Message):
    __slots__ = ("resources", "is_heartbeat")
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    IS_HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    resources: WorkerResources
    is_heartbeat: bool
    def __init__(self, resources: _Optional[_Union[WorkerResources, _Mapping]] = ..., is_heartbeat: bool = ...) -> None: ...

class WorkerResources(_message.Message):
    __slots__ = ("worker_id", "cpu_cores", "memory_bytes", "gpu_count", "gpu_memory_bytes", "available_functions", "vram_models", "supports_model_loading", "deployment_id", "runpod_pod_id", "gpu_is_busy", "gpu_memory_used_bytes", "gpu_name", "gpu_driver", "gpu_memory_free_bytes", "max_concurrency", "function_concurrency", "cuda_version", "torch_version", "function_schemas", "gpu_sm", "tensorrt_version", "onnxruntime_version", "disk_models")
    class FunctionConcurrencyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CPU_CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FUNCTIONS_FIELD_NUMBER: _ClassVar[int]
    VRAM_MODELS_FIELD_NUMBER: _ClassVar[int]
    SUPPORTS_MODEL_LOADING_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_ID_FIELD_NUMBER: _ClassVar[int]
    RUNPOD_POD_ID_FIELD_NUMBER: _ClassVar[int]
    GPU_IS_BUSY_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_NAME_FIELD_NUMBER: _ClassVar[int]
    GPU_DRIVER_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    CUDA_VERSION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_SCHEMAS_FIELD_NUMBER: _ClassVar[int]
    GPU_SM_FIELD_NUMBER: _ClassVar[int]
    TENSORRT_VERSION_FIELD_NUMBER: _ClassVar[int]
    ONNXRUNTIME_VERSION_FIELD_NUMBER: _ClassVar[int]
    DISK_MODELS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    cpu_cores: int
    memory_bytes: int
    gpu_count: int
    gpu_memory_bytes: int
    available_functions: _containers.RepeatedScalarFieldContainer[str]
    vram_models: _containers.RepeatedScalarFieldContainer[str]
    supports_model_loading: bool
    deployment_id: str
    runpod_pod_id: str
    gpu_is_busy: bool
    gpu_memory_used_bytes: int
    gpu_name: str
    gpu_driver: str
    gpu_memory_free_bytes: int
    max_concurrency: int
    function_concurrency: _containers.ScalarMap[str, int]
    cuda_version: str
    torch_version: str
    function_schemas: _containers.RepeatedCompositeFieldContainer[FunctionSchema]
    gpu_sm: str
    tensorrt_version: str
    onnxruntime_version: str
    disk_models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., cpu_cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., gpu_count: _Optional[int] = ..., gpu_memory_bytes: _Optional[int] = ..., available_functions: _Optional[_Iterable[str]] = ..., vram_models: _Optional[_Iterable[str]] = ..., supports_model_loading: bool = ..., deployment_id: _Optional[str] = ..., runpod_pod_id: _Optional[str] = ..., gpu_is_busy: bool = ..., gpu_memory_used_bytes: _Optional[int] = ..., gpu_name: _Optional[str] = ..., gpu_driver: _Optional[str] = ..., gpu_memory_free_bytes: _Optional[int] = ..., max_concurrency: _Optional[int] = ..., function_concurrency: _Optional[_Mapping[str, int]] = ..., cuda_version: _Optional[str] = ..., torch_version: _Optional[str] = ..., function_schemas: _Optional[_Iterable[_Union[FunctionSchema, _Mapping]]] = ..., gpu_sm: _Optional[str] = ..., tensorrt_version: _Optional[str] = ..., onnxruntime_version: _Optional[str] = ..., disk_models: _Optional[_Iterable[str]] = ...) -> None: ...

class FunctionSchema(_message.Message):
    __slots__ = ("name", "input_schema_json", "output_schema_json", "injection_json", "incremental_output", "delta_schema_json")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INPUT_SCHEMA_JSON_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SCHEMA_JSON_FIELD_NUMBER: _ClassVar[int]
    INJECTION_JSON_FIELD_NUMBER: _ClassVar[int]
    INCREMENTAL_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    DELTA_SCHEMA_JSON_FIELD_NUMBER: _ClassVar[int]
    name: str
    input_schema_json: bytes
    output_schema_json: bytes
    injection_json: bytes
    incremental_output: bool
    delta_schema_json: bytes
    def __init__(self, name: _Optional[str] = ..., input_schema_json: _Optional[bytes] = ..., output_schema_json: _Optional[bytes] = ..., injection_json: _Optional[bytes] = ..., incremental_output: bool = ..., delta_schema_json: _Optional[bytes] = ...) -> None: ...

class TaskExecutionRequest(_message.Message):
    __slots__ = ("run_id", "function_name", "input_payload", "required_models", "timeout_ms", "tenant_id", "user_id", "file_base_url", "file_token")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_NAME_FIELD_NUMBER: _ClassVar[int]
    INPUT_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_MODELS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    FILE_BASE_URL_FIELD_NUMBER: _ClassVar[int]
    FILE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    function_name: str
    input_payload: bytes
    required_models: _containers.RepeatedScalarFieldContainer[str]
    timeout_ms: int
    tenant_id: str
    user_id: str
    file_base_url: str
    file_token: str
    def __init__(self, run_id: _Optional[str] = ..., function_name: _Optional[str] = ..., input_payload: _Optional[bytes] = ..., required_models: _Optional[_Iterable[str]] = ..., timeout_ms: _Optional[int] = ..., tenant_id: _Optional[str] = ..., user_id: _Optional[str] = ..., file_base_url: _Optional[str] = ..., file_token: _Optional[str] = ...) -> None: ...

class TaskExecutionResult(_message.Message):
    __slots__ = ("run_id", "success", "output_payload", "error_message", "error_type", "retryable", "safe_message")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_TYPE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    SAFE_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    success: bool
    output_payload: bytes
    error_message: str
    error_type: str
    retryable: bool
    safe_message: str
    def __init__(self, run_id: _Optional[str] = ..., success: bool = ..., output_payload: _Optional[bytes] = ..., error_message: _Optional[str] = ..., error_type: _Optional[str] = ..., retryable: bool = ..., safe_message: _Optional[str] = ...) -> None: ...

class SpawnTasksRequest(_message.Message):
    __slots__ = ("parent_run_id", "child_tasks")
    PARENT_RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CHILD_TASKS_FIELD_NUMBER: _ClassVar[int]
    parent_run_id: str
    child_tasks: _containers.RepeatedCompositeFieldContainer[TaskExecutionRequest]
    def __init__(self, parent_run_id: _Optional[str] = ..., child_tasks: _Optional[_Iterable[_Union[TaskExecutionRequest, _Mapping]]] = ...) -> None: ...

class WorkerEvent(_message.Message):
    __slots__ = ("run_id", "event_type", "payload_json")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_JSON_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    event_type: str
    payload_json: bytes
    def __init__(self, run_id: _Optional[str] = ..., event_type: _Optional[str] = ..., payload_json: _Optional[bytes] = ...) -> None: ...

class LoadModelCommand(_message.Message):
    __slots__ = ("model_id",)
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    def __init__(self, model_id: _Optional[str] = ...) -> None: ...

class UnloadModelCommand(_message.Message):
    __slots__ = ("model_id",)
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    def __init__(self, model_id: _Optional[str] = ...) -> None: ...

class LoadModelResult(_message.Message):
    __slots__ = ("model_id", "success", "error_message")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    success: bool
    error_message: str
    def __init__(self, model_id: _Optional[str] = ..., success: bool = ..., error_message: _Optional[str] = ...) -> None: ...

class UnloadModelResult(_message.Message):
    __slots__ = ("model_id", "success", "error_message")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    success: bool
    error_message: str
    def __init__(self, model_id: _Optional[str] = ..., success: bool = ..., error_message: _Optional[str] = ...) -> None: ...

class InterruptTaskCommand(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class DeploymentModelConfig(_message.Message):
    __slots__ = ("supported_model_ids", "model_id_by_key")
    class ModelIdByKeyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SUPPORTED_MODEL_IDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_BY_KEY_FIELD_NUMBER: _ClassVar[int]
    supported_model_ids: _containers.RepeatedScalarFieldContainer[str]
    model_id_by_key: _containers.ScalarMap[str, str]
    def __init__(self, supported_model_ids: _Optional[_Iterable[str]] = ..., model_id_by_key: _Optional[_Mapping[str, str]] = ...) -> None: ...

class RealtimeOpenCommand(_message.Message):
    __slots__ = ("session_id", "function_name", "required_models", "tenant_id", "user_id", "timeout_ms", "file_base_url", "file_token")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_NAME_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_MODELS_FIELD_NUMBER: _ClassVar[int]
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    FILE_BASE_URL_FIELD_NUMBER: _ClassVar[int]
    FILE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    function_name: str
    required_models: _containers.RepeatedScalarFieldContainer[str]
    tenant_id: str
    user_id: str
    timeout_ms: int
    file_base_url: str
    file_token: str
    def __init__(self, session_id: _Optional[str] = ..., function_name: _Optional[str] = ..., required_models: _Optional[_Iterable[str]] = ..., tenant_id: _Optional[str] = ..., user_id: _Optional[str] = ..., timeout_ms: _Optional[int] = ..., file_base_url: _Optional[str] = ..., file_token: _Optional[str] = ...) -> None: ...

class RealtimeFrame(_message.Message):
    __slots__ = ("session_id", "data", "is_text")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    IS_TEXT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    data: bytes
    is_text: bool
    def __init__(self, session_id: _Optional[str] = ..., data: _Optional[bytes] = ..., is_text: bool = ...) -> None: ...

class RealtimeCloseCommand(_message.Message):
    __slots__ = ("session_id", "reason")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    reason: str
    def __init__(self, session_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
