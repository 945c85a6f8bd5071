"""The wire to the scheduler: the generated protobuf module and the names that go with it.

Owns: nothing but facts. `worker_scheduler_pb2` is generated from proto/worker_scheduler.proto by
`make proto`; `make lint` fails when it is stale. Only code that speaks the wire imports this package:
the supervisor, and the scheduler that ships for development and tests.
"""

METHOD = "/scheduler.SchedulerWorkerService/ConnectWorker"
"""Full name of the one method, as HTTP/2's :path."""

SERVICE = "scheduler.SchedulerWorkerService"

NOT_LEADER_PREFIX = "not_leader:"
"""Status details of a FAILED_PRECONDITION that names the scheduler to dial instead."""

TRANSPORT_LIMIT_BYTES = 256 * 1024 * 1024
"""The transport's own limit for one payload: gRPC's default of 4 MiB refuses images and audio."""

MESSAGE_LIMIT_BYTES = TRANSPORT_LIMIT_BYTES + 1024 * 1024
"""That of the message around it."""
