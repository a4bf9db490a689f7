"""Serves Google's storage from memory: gcs_emulator.py PORT BUCKET.

TensorStore writes an object only if it is still the one that it has read, told by its generation,
which gcp-storage-emulator neither says where content is read nor heeds where some is written.
"""

import logging
import sys
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def generation(storage, bucket, name):
    """Returns the generation of an object, "0" if there is none."""
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def download(request, response, storage, *args, of_emulator=objects.download, **kwargs):
    of_emulator(request, response, storage, *args, **kwargs)
    bucket, name = request.params["bucket_name"], request.params["object_id"]
    response["x-goog-generation"] = generation(storage, bucket, name)


def insert(request, response, storage, *args, of_emulator=objects.insert, **kwargs):
    wanted = request.query.get("ifGenerationMatch")
    if wanted and "name" in request.query:
        bucket, name = request.params["bucket_name"], request.query["name"][0]
        if generation(storage, bucket, name) != wanted[0]:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
    of_emulator(request, response, storage, *args, **kwargs)


objects.download, objects.insert = download, insert

from gcp_storage_emulator.server import create_server  # noqa: E402

logging.basicConfig(level=logging.INFO)
_, port, bucket = sys.argv
create_server("localhost", int(port), in_memory=True, default_bucket=bucket).run()
