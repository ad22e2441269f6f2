"""The generated code is that of device.proto."""

from __future__ import annotations

from pathlib import Path

import fedssl_client
from fedssl_client import device_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

CLIENT = Path(fedssl_client.__file__).parents[1]


def test_the_generated_code_is_up_to_date(tmp_path: Path):
    assert protoc.main(["protoc", f"-I{CLIENT}", f"--descriptor_set_out={tmp_path / 'set'}", "fedssl_client/device.proto"]) == 0
    (made,) = FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    kept = FileDescriptorProto.FromString(device_pb2.DESCRIPTOR.serialized_pb)
    made.ClearField("source_code_info")
    for one in [field for message in made.message_type for field in message.field]:
        one.ClearField("json_name")
    for one in [field for message in kept.message_type for field in message.field]:
        one.ClearField("json_name")
    assert made == kept, "run: make proto"
