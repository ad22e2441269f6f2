from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecordRequest(_message.Message):
    __slots__ = ("item", "time", "value")
    ITEM_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    item: str
    time: float
    value: float
    def __init__(self, item: _Optional[str] = ..., time: _Optional[float] = ..., value: _Optional[float] = ...) -> None: ...

class RecordReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RecommendRequest(_message.Message):
    __slots__ = ("k", "include_seen")
    K_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_SEEN_FIELD_NUMBER: _ClassVar[int]
    k: int
    include_seen: bool
    def __init__(self, k: _Optional[int] = ..., include_seen: _Optional[bool] = ...) -> None: ...

class RecommendReply(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Recommendation]
    def __init__(self, items: _Optional[_Iterable[_Union[Recommendation, _Mapping]]] = ...) -> None: ...

class Recommendation(_message.Message):
    __slots__ = ("item", "title", "score")
    ITEM_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    item: str
    title: str
    score: float
    def __init__(self, item: _Optional[str] = ..., title: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("version", "events", "model_run", "model_round", "is_training", "may_train", "servers", "closed_gates", "epsilon", "uploads", "trainings_today", "steps", "failed_steps")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_RUN_FIELD_NUMBER: _ClassVar[int]
    MODEL_ROUND_FIELD_NUMBER: _ClassVar[int]
    IS_TRAINING_FIELD_NUMBER: _ClassVar[int]
    MAY_TRAIN_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    CLOSED_GATES_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    TRAININGS_TODAY_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FAILED_STEPS_FIELD_NUMBER: _ClassVar[int]
    version: str
    events: int
    model_run: str
    model_round: int
    is_training: bool
    may_train: bool
    servers: _containers.RepeatedScalarFieldContainer[str]
    closed_gates: _containers.RepeatedScalarFieldContainer[str]
    epsilon: float
    uploads: int
    trainings_today: int
    steps: int
    failed_steps: int
    def __init__(self, version: _Optional[str] = ..., events: _Optional[int] = ..., model_run: _Optional[str] = ..., model_round: _Optional[int] = ..., is_training: _Optional[bool] = ..., may_train: _Optional[bool] = ..., servers: _Optional[_Iterable[str]] = ..., closed_gates: _Optional[_Iterable[str]] = ..., epsilon: _Optional[float] = ..., uploads: _Optional[int] = ..., trainings_today: _Optional[int] = ..., steps: _Optional[int] = ..., failed_steps: _Optional[int] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("item", "all")
    ITEM_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    item: str
    all: bool
    def __init__(self, item: _Optional[str] = ..., all: _Optional[bool] = ...) -> None: ...

class ForgetReply(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: int
    def __init__(self, events: _Optional[int] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExportReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: str
    def __init__(self, server: _Optional[str] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: str
    def __init__(self, server: _Optional[str] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ("had_joined",)
    HAD_JOINED_FIELD_NUMBER: _ClassVar[int]
    had_joined: bool
    def __init__(self, had_joined: _Optional[bool] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("users",)
    USERS_FIELD_NUMBER: _ClassVar[int]
    users: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, users: _Optional[_Iterable[int]] = ...) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("server", "download", "seconds", "known_rows", "known_chain")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    KNOWN_ROWS_FIELD_NUMBER: _ClassVar[int]
    KNOWN_CHAIN_FIELD_NUMBER: _ClassVar[int]
    server: str
    download: bytes
    seconds: float
    known_rows: int
    known_chain: bytes
    def __init__(self, server: _Optional[str] = ..., download: _Optional[bytes] = ..., seconds: _Optional[float] = ..., known_rows: _Optional[int] = ..., known_chain: _Optional[bytes] = ...) -> None: ...

class TrainReply(_message.Message):
    __slots__ = ("upload", "ledger_rows", "ledger_chain")
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    LEDGER_ROWS_FIELD_NUMBER: _ClassVar[int]
    LEDGER_CHAIN_FIELD_NUMBER: _ClassVar[int]
    upload: bytes
    ledger_rows: int
    ledger_chain: bytes
    def __init__(self, upload: _Optional[bytes] = ..., ledger_rows: _Optional[int] = ..., ledger_chain: _Optional[bytes] = ...) -> None: ...
