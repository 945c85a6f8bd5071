"""The environment contract: names, defaults, notations, errors, and what executors inherit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.config import (
    ConfigError,
    LocalModel,
    Settings,
    child_environment,
    load_settings,
    process_environment,
    secrets,
    split_address,
    unknown_variables,
)
from supervisor.config_parse import Invalid, byte_size
from supervisor.config_table import render_help, render_table
from supervisor.exit_codes import ExitCode, render_exit_codes
from supervisor.settings import VARIABLES, Variable

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "s3cr3t-value-of-the-test"
CONTRACT = {
    "SCHEDULER_ADDR": "localhost:8080",
    "USE_TLS": "false",
    "WORKER_GRPC_TRANSPORT": "grpcio",
    "SCHEDULER_JWKS_TTL_SECONDS": "300",
    "RECONNECT_DELAY": "5",
    "RECONNECT_MAX_DELAY": "60",
    "RECONNECT_JITTER_SECONDS": "1",
    "MAX_RECONNECT_ATTEMPTS": "0",
    "HEARTBEAT_INTERVAL_SECONDS": "10",
    "WORKER_DRAIN_TIMEOUT_SECONDS": "30",
    "WORKER_MAX_CONCURRENCY": "0",
    "WORKER_EXECUTOR_THREADS": "64",
    "WORKER_MODEL_CONCURRENCY": "1",
    "WORKER_CANCEL_GRACE_SECONDS": "5",
    "WORKER_MAX_INPUT_BYTES": "0",
    "WORKER_MAX_OUTPUT_BYTES": "0",
    "WORKER_MAX_OUTPUT_DELTA_BYTES": "65536",
    "WORKER_MAX_OUTPUT_DELTA_EVENTS": "0",
    "WORKER_MAX_WS_FRAME_BYTES": "0",
    "WORKER_MAX_UPLOAD_BYTES": "200 MiB",
    "WORKER_MAX_INPUT_FILE_BYTES": "200 MiB",
    "WORKER_RUN_DIR": "/tmp/cozy",
    "WORKER_VRAM_SAFETY_MARGIN_GB": "3.5",
    "WORKER_MODEL_CACHE_DIR": "/tmp/model_cache",
    "WORKER_MODEL_CACHE_MAX_GB": "0",
    "WORKER_MAX_CONCURRENT_DOWNLOADS": "2",
    "WORKER_HTTP_ADDR": "127.0.0.1:9090",
    "WORKER_HOST_CACHE_GB": "0",
    "WORKER_BUSY_POLL_US": "300",
    "WORKER_WARM_SPARE": "0",
    "WORKER_LOG_FORMAT": "text",
    "WORKER_LOG_LEVEL": "info",
}
MODELS_JSON = (
    '{"c:a/b": {"root_dir": "/m", "files": {"w": "w.bin"}, "metadata": {"n": 1, "s": "t"}}, "hf:c": {"root_dir": "/n"}}'
)
UNSET_BY_DEFAULT = [
    "SCHEDULER_ADDRS",
    "SCHEDULER_CA_FILE",
    "SCHEDULER_CLIENT_CERT_FILE",
    "SCHEDULER_CLIENT_KEY_FILE",
    "AUTH_TOKEN",
    "WORKER_JWT",
    "AUTH_TOKEN_FILE",
    "SCHEDULER_JWKS_URL",
    "SCHEDULER_JWT_ISSUER",
    "SCHEDULER_JWT_AUDIENCE",
    "DEPLOYMENT_ID",
    "TENANT_ID",
    "RUNPOD_POD_ID",
    "USER_MODULES",
    "WORKER_MANIFEST",
    "WORKER_GPUS",
    "WORKER_MAX_VRAM_GB",
    "WORKER_MODEL_ARTIFACTS_JSON",
    "WORKER_RUNTIME_LOADERS_JSON",
    "COZY_HUB_URL",
    "COZY_HUB_TOKEN",
    "HF_TOKEN",
    "HF_HOME",
    "COZY_HF_COMPONENTS",
    "FILE_API_BASE_URL",
    "FILE_API_TOKEN",
    "WORKER_OUTBOX_DIR",
    "WORKER_EXECUTOR_UID",
    "WORKER_EXECUTOR_GID",
]


def test_defaults_are_the_contract() -> None:
    by_env = {variable.env: variable for variable in VARIABLES.values()}
    assert {env: by_env[env].default for env in CONTRACT} == CONTRACT
    defaults = load_settings({})
    attributes = {variable.env: name for name, variable in VARIABLES.items()}
    assert not [env for env in UNSET_BY_DEFAULT if getattr(defaults, attributes[env])]


def test_typed_defaults() -> None:
    settings = load_settings({})
    assert (settings.reconnect_delay, settings.reconnect_max_delay, settings.reconnect_jitter_seconds) == (5, 60, 1)
    assert settings.max_upload_bytes == settings.max_input_file_bytes == 200 * 2**20
    assert str(settings.cache_dir) == "/tmp/cozy/cache"
    assert settings.cozy_hf_weight_precisions == ("fp16", "bf16")
    assert settings.executors == 1
    assert settings.use_tls is False
    assert settings.max_vram_gb is None


def test_attributes_are_named_after_their_variables() -> None:
    special = {
        "WORKER_ID": "worker_id",
        "WORKER_JWT": "worker_jwt",
        "WORKER_MODEL_ARTIFACTS_JSON": "model_artifacts",
        "WORKER_RUNTIME_LOADERS_JSON": "runtime_loaders",
    }
    for name, variable in VARIABLES.items():
        assert name == special.get(variable.env, variable.env.lower().removeprefix("worker_"))


@pytest.mark.parametrize(
    ("env", "written", "attribute", "expected"),
    [
        ("SCHEDULER_ADDR", "[::1]:9000", "scheduler_addr", "[::1]:9000"),
        ("SCHEDULER_ADDR", " 10.0.0.7:443 ", "scheduler_addr", "10.0.0.7:443"),
        ("SCHEDULER_ADDRS", "a:1, b.example:2,", "scheduler_addrs", ("a:1", "b.example:2")),
        ("USE_TLS", "ON", "use_tls", True),
        ("WORKER_WARM_SPARE", "yes", "warm_spare", True),
        ("RECONNECT_DELAY", "0.25", "reconnect_delay", 0.25),
        ("WORKER_MAX_INPUT_BYTES", "3 kib", "max_input_bytes", 3072),
        ("WORKER_MAX_OUTPUT_FILE_BYTES", "5", "max_upload_bytes", 5),
        ("WORKER_GPUS", "0, 2", "gpus", ("0", "2")),
        ("WORKER_GPUS", "GPU-8f6e-11,MIG-1c2d", "gpus", ("GPU-8f6e-11", "MIG-1c2d")),
        ("USER_MODULES", "app.functions,other", "user_modules", ("app.functions", "other")),
        ("WORKER_MAX_VRAM_GB", "20.5", "max_vram_gb", 20.5),
        ("WORKER_EXECUTOR_UID", "0", "executor_uid", 0),
        ("COZY_HUB_URL", "https://hub.example/", "cozy_hub_url", "https://hub.example"),
        ("WORKER_HTTP_ADDR", "", "http_addr", ""),
        ("WORKER_HTTP_ADDR", "0.0.0.0:0", "http_addr", "0.0.0.0:0"),
        ("WORKER_LOG_FORMAT", "JSON", "log_format", "json"),
        ("WORKER_RUNTIME_LOADERS_JSON", '{"a.B": "app.load:make"}', "runtime_loaders", {"a.B": "app.load:make"}),
        (
            "WORKER_MODEL_ARTIFACTS_JSON",
            MODELS_JSON,
            "model_artifacts",
            {
                "c:a/b": LocalModel(root_dir="/m", files={"w": "w.bin"}, metadata={"n": "1", "s": "t"}),
                "hf:c": LocalModel(root_dir="/n"),
            },
        ),
    ],
)
def test_accepted(env: str, written: str, attribute: str, expected: object) -> None:
    assert getattr(load_settings({env: written}), attribute) == expected


@pytest.mark.parametrize(
    ("env", "written", "expectation"),
    [
        ("SCHEDULER_ADDR", "localhost", "host:port"),
        ("SCHEDULER_ADDR", "http://localhost:8080", "host:port"),
        ("SCHEDULER_ADDR", "::1:8080", "host:port"),
        ("SCHEDULER_ADDR", "localhost:0", "1 to 65535"),
        ("SCHEDULER_ADDR", "localhost:65536", "host:port"),
        ("SCHEDULER_ADDRS", "a:1,b", "host:port"),
        ("USE_TLS", "maybe", "true or false"),
        ("RECONNECT_DELAY", "-1", "a number, 0 or more"),
        ("RECONNECT_DELAY", "nan", "a number, 0 or more"),
        ("RECONNECT_DELAY", "inf", "a number, 0 or more"),
        ("HEARTBEAT_INTERVAL_SECONDS", "0", "above 0"),
        ("WORKER_EXECUTORS", "0", "1 or more"),
        ("WORKER_EXECUTORS", "two", "a whole number"),
        ("WORKER_EXECUTORS", "1.5", "a whole number"),
        ("WORKER_MAX_INPUT_BYTES", "10MB", "KiB"),
        ("WORKER_MAX_INPUT_BYTES", "-5", "bytes"),
        ("WORKER_GPUS", "first", "GPU-"),
        ("WORKER_GPUS", "1,01", "twice"),
        ("USER_MODULES", "app/functions.py", "dotted module names"),
        ("WORKER_GRPC_TRANSPORT", "http3", "grpcio or h2"),
        ("WORKER_LOG_LEVEL", "loud", "debug"),
        ("COZY_HUB_URL", "hub.example", "http://"),
        ("COZY_HUB_URL", "http://[::1", "http://"),
        ("COZY_HF_WEIGHT_PRECISIONS", "fp8", "fp16"),
        ("SCHEDULER_CA_FILE", "/nonexistent/ca.pem", "file that exists"),
        ("WORKER_MODEL_ARTIFACTS_JSON", "{", "JSON"),
        ("WORKER_MODEL_ARTIFACTS_JSON", '{"m": {"files": {}}}', "root_dir"),
        ("WORKER_MODEL_ARTIFACTS_JSON", '{"m": {"root_dir": ""}}', "root_dir"),
        ("WORKER_MODEL_ARTIFACTS_JSON", '{"m": {"root_dir": "/m", "fles": {}}}', "fles"),
        ("WORKER_MODEL_ARTIFACTS_JSON", '{"\udcff": 1}', "JSON"),
        ("WORKER_RUNTIME_LOADERS_JSON", '{"a.B": "make"}', "<module>:<callable>"),
    ],
)
def test_refused_with_one_line_that_names_variable_value_and_expectation(
    env: str, written: str, expectation: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({env: written})
    message = str(caught.value)
    assert message.startswith(f"{env} is {written!r}"[:80])
    assert f"expected {expectation}" in message or (expectation in message.partition("; expected ")[2])
    assert "\n" not in message
    assert caught.value.exit_code is ExitCode.CONFIG


def test_the_older_name_is_what_the_error_names_and_the_newer_one_wins() -> None:
    with pytest.raises(ConfigError, match=r"^WORKER_MAX_OUTPUT_FILE_BYTES is 'x'"):
        load_settings({"WORKER_MAX_OUTPUT_FILE_BYTES": "x"})
    both = {"WORKER_MAX_OUTPUT_FILE_BYTES": "x", "WORKER_MAX_UPLOAD_BYTES": "7"}
    assert load_settings(both).max_upload_bytes == 7


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"USE_TLS": "x" * 5000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("env", sorted(variable.env for variable in VARIABLES.values()))
def test_empty_is_unset(env: str) -> None:
    name = next(name for name, variable in VARIABLES.items() if variable.env == env)
    if env == "WORKER_HTTP_ADDR":
        assert load_settings({env: ""}).http_addr == ""
    elif env == "WORKER_ID":
        assert load_settings({env: " "}).worker_id
    else:
        assert getattr(load_settings({env: "  "}), name) == getattr(load_settings({}), name)


def test_defaults_that_follow_other_variables(tmp_path: Path) -> None:
    assert load_settings({"WORKER_RUN_DIR": str(tmp_path)}).cache_dir == tmp_path / "cache"
    own = {"WORKER_RUN_DIR": str(tmp_path), "WORKER_CACHE_DIR": str(tmp_path / "elsewhere")}
    assert load_settings(own).cache_dir == tmp_path / "elsewhere"
    assert load_settings({"WORKER_ID": "w1"}).worker_id == "w1"
    assert load_settings({}).worker_id != load_settings({}).worker_id


def test_scheduler_targets() -> None:
    assert load_settings({}).scheduler_targets == ("localhost:8080",)
    seeds_only = load_settings({"SCHEDULER_ADDRS": "a:1,b:2"})
    assert seeds_only.scheduler_targets == ("a:1", "b:2")
    both = load_settings({"SCHEDULER_ADDR": "b:2", "SCHEDULER_ADDRS": "a:1,b:2"})
    assert both.scheduler_targets == ("b:2", "a:1")


def test_tls_variables_must_agree(tmp_path: Path) -> None:
    (file := tmp_path / "f.pem").write_text("x")
    cert, key, ca = "SCHEDULER_CLIENT_CERT_FILE", "SCHEDULER_CLIENT_KEY_FILE", "SCHEDULER_CA_FILE"
    tls = {"USE_TLS": "true"}
    with pytest.raises(ConfigError, match=f"^{cert} is set without {key}"):
        load_settings(tls | {cert: str(file)})
    with pytest.raises(ConfigError, match=f"^{key} is set without {cert}"):
        load_settings(tls | {key: str(file)})
    with pytest.raises(ConfigError, match=f"^{ca} is set but USE_TLS is false"):
        load_settings({ca: str(file)})
    settings = load_settings(tls | {cert: str(file), key: str(file), ca: str(file)})
    assert settings.scheduler_client_key_file == file


def test_gpus_must_be_among_the_fake_ones() -> None:
    assert load_settings({"WORKER_FAKE_GPU_COUNT": "2", "WORKER_GPUS": "1"}).gpus == ("1",)
    for gpus in ("2", "GPU-abc"):
        with pytest.raises(ConfigError, match=r"^WORKER_GPUS names .* from 0 to 1"):
            load_settings({"WORKER_FAKE_GPU_COUNT": "2", "WORKER_GPUS": gpus})


SECRET_NAMES = ("AUTH_TOKEN", "WORKER_JWT", "COZY_HUB_TOKEN", "HF_TOKEN", "FILE_API_TOKEN")


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secrets_are_never_shown(name: str) -> None:
    settings = load_settings({name: SECRET})
    assert SECRET not in repr(settings)
    assert f"{name.lower()}=***" in repr(settings)
    assert secrets(settings) == {SECRET}
    with pytest.raises(ConfigError) as caught:
        load_settings({name: f"{SECRET} with spaces"})
    assert SECRET not in str(caught.value)
    assert str(caught.value).startswith(f"{name} is ")


def test_repr_shows_the_rest() -> None:
    shown = repr(load_settings({"WORKER_ID": "w1", "WORKER_RUN_DIR": "/r"}))
    assert shown.startswith("Settings(scheduler_addr='localhost:8080'")
    assert "worker_id='w1'" in shown
    assert "run_dir='/r'" in shown
    assert "auth_token=''" in shown


def test_executors_inherit_no_secret(tmp_path: Path) -> None:
    (key := tmp_path / "k").write_text("x")
    environ = {name: f"{SECRET}-{index}" for index, name in enumerate(SECRET_NAMES)} | {
        "USE_TLS": "1",
        "SCHEDULER_CLIENT_CERT_FILE": str(key),
        "SCHEDULER_CLIENT_KEY_FILE": str(key),
        "AUTH_TOKEN_FILE": str(tmp_path / "token"),
        "HUGGING_FACE_HUB_TOKEN": "hf_other",
        "COPY_OF_TOKEN": f"Bearer {SECRET}-0",
        "PATH": "/bin",
        "TENANT_SETTING": "kept",
        "WORKER_RUN_DIR": "/r",
    }
    inherited = child_environment(environ, load_settings(environ))
    assert inherited.keys() == {"USE_TLS", "SCHEDULER_CLIENT_CERT_FILE", "PATH", "TENANT_SETTING", "WORKER_RUN_DIR"}
    assert SECRET not in repr(inherited)
    assert environ["AUTH_TOKEN"] == f"{SECRET}-0"


def test_a_short_secret_does_not_take_innocent_variables_along() -> None:
    environ = {"AUTH_TOKEN": "a", "PATH": "/bin/a"}
    assert child_environment(environ, load_settings(environ)) == {"PATH": "/bin/a"}


def test_likely_typing_errors() -> None:
    environ = {
        "WORKER_MAX_CONCURENCY": "3",
        "SCHEDULER_ADRR": "x",
        "WORKER_MAX_OUTPUT_FILE_BYTES": "1",
        "WORKER_TENANTS_OWN_THING": "1",
        "PATH": "/bin",
    } | dict.fromkeys((variable.env for variable in VARIABLES.values()), "x")
    assert unknown_variables(environ) == [
        "SCHEDULER_ADRR is not a setting of the worker: did you mean SCHEDULER_ADDR?",
        "WORKER_MAX_CONCURENCY is not a setting of the worker: did you mean WORKER_MAX_CONCURRENCY?",
    ]


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Settings().worker_id = "other"  # type: ignore[misc]


def test_settings_can_be_made_without_an_environment() -> None:
    assert Settings(max_concurrency=3).max_concurrency == 3
    assert Settings().reconnect_delay == load_settings({}).reconnect_delay


def test_process_environment_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_ID", "from-env")
    environ = process_environment()
    environ["WORKER_ID"] = "changed"
    assert load_settings(process_environment()).worker_id == "from-env"


def test_rendered_tables_have_every_variable() -> None:
    table, help_text = render_table(), render_help(80)
    for variable in VARIABLES.values():
        assert f"| {variable.env} |" in table
        assert f"  {variable.env}  [" in help_text
    assert "| RECONNECT_DELAY | 5 s |" in table
    assert max(map(len, help_text.splitlines())) <= 80
    assert len(table.splitlines()) == len(VARIABLES) + 2


def test_exit_codes() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0,
        "BOOT_FAILED": 3,
        "NO_FUNCTIONS": 4,
        "PACKAGE_CLASH": 5,
        "FORCED_STOP": 6,
        "UNDELIVERED": 7,
        "USAGE": 64,
        "SCHEDULER_UNREACHABLE": 69,
        "INTERNAL": 70,
        "TOKEN_REFUSED": 77,
        "CONFIG": 78,
    }
    assert f"| 78 | `CONFIG` | {ExitCode.CONFIG.meaning} |" in render_exit_codes()


def test_split_address() -> None:
    assert split_address("[fe80::1%eth0]:80") == ("fe80::1%eth0", 80)
    assert split_address("localhost:8080") == ("localhost", 8080)


@given(st.integers(0, 10**12), st.sampled_from([("", 1), ("KiB", 2**10), ("mib", 2**20), (" GiB", 2**30)]))
def test_sizes(count: int, suffix: tuple[str, int]) -> None:
    assert byte_size(f"{count}{suffix[0]}") == count * suffix[1]


@given(st.sampled_from(list(VARIABLES.values())), st.text(st.characters(exclude_characters="\0"), min_size=1))
def test_any_text_is_a_value_or_a_one_line_error(variable: Variable, written: str) -> None:
    message = ""
    try:
        load_settings({variable.env: written})
    except ConfigError as error:
        message = str(error)
    assert not message or message.startswith(f"{variable.env} is ")
    assert len(message.splitlines()) <= 1


@given(st.text())
def test_addresses_never_fail_otherwise(written: str) -> None:
    try:
        host, port = split_address(written)
    except Invalid:
        return
    assert host
    assert 0 <= port <= 65535
