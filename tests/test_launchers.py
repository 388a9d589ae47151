"""The place of a process in the environments of several launchers."""

import http.server
import threading

import pytest
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster

from ringattn.mesh.launchers import FIRST_PORT, Place, find_place

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "a:7", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[007-010,12],other",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "99",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_NAMESPACE": "prterun-node-1-32051@1",
}
OLD_OPEN_MPI = {name: value for name, value in OPEN_MPI.items() if name != "PMIX_NAMESPACE"}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}
SLURM_PORT = FIRST_PORT + (31 * 1000 + 2) % 4096


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        (EXPLICIT, Place("a:7", 4, 3)),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, Place(f"gpu007:{SLURM_PORT}", 16, 9, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "n1,n2", "JAX_COORDINATOR_PORT": "99"}, Place("n1:99", 16, 9, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "n1"}, Place(f"n1:{SLURM_PORT}", 16, 9, [1])),
        (SLURM | {"SLURM_STEP_NUM_NODES": "16"}, Place(f"gpu007:{SLURM_PORT}", 16, 9)),  # a process has all GPUs
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, Place(f"gpu007:{SLURM_PORT}", 16, 9)),  # srun --gpus-per-task=1
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, Place(f"gpu007:{SLURM_PORT}", 16, 9, [1])),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1000", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, None),  # a batch script outside srun
        (SLURM | EXPLICIT, Place("a:7", 4, 3)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "a:7"}, Place("a:7", 16, 9, [1])),
        (OPEN_MPI, Place(f"node-1:{FIRST_PORT + 32051 % 4096}", 2, 1, [1])),
        (OPEN_MPI | SLURM, Place(f"node-1:{FIRST_PORT + 32051 % 4096}", 2, 1, [1])),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Place(f"node-1:{FIRST_PORT + 32051 % 4096}", 2, 1)),
        (OLD_OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "a:7"}, Place("a:7", 2, 1, [1])),
        (
            OLD_OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"},
            Place(f"10.96.0.1:{FIRST_PORT + 1531576320 // 4096 % 4096}", 2, 1, [1]),
        ),
        (
            OLD_OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9b,2620::3]:43370"},
            Place(f"[fe80::b9b]:{FIRST_PORT + 1}", 2, 1, [1]),
        ),
        (TPU, Place("t0:8482", 2, 1)),
        (TPU | {"JOB_COMPLETION_INDEX": "1"}, Place("t0:8482", 2, 1)),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (
            TPU | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "m:8080"},
            Place("m:8482", 6, 5),
        ),
        ({"JAX_COORDINATOR_ADDRESS": "j:7", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}, Place("j:7", 4, 2)),
        ({"JOB_COMPLETION_INDEX": "0"}, None),
    ],
)
def test_the_environment_of_a_launcher_gives_the_place(environ, place):
    assert find_place(environ) == place


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:7"}, "JAX_NUM_PROCESSES is not set"),
        ({"JAX_COORDINATOR_ADDRESS": "a:7", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is not set"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "process index 4 must be from 0 to 3"),
        (EXPLICIT | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1 must be a number"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "a"}, "the address of process 0, 'a', must be HOST:PORT"),
        (OLD_OPEN_MPI, "use mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST does not name"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID is not set"),
        ({"JOB_COMPLETION_INDEX": "1"}, "set JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0 and JAX_NUM_PROCESSES"),
    ],
)
def test_an_incomplete_environment_is_an_error(environ, message):
    with pytest.raises(ValueError, match=message):
        find_place(environ)


def test_a_cloud_tpu_vm_reads_its_metadata(monkeypatch):
    """Also checks the private names of JAX that `launchers` uses."""
    pytest.importorskip("requests")
    answers = {
        "agent-worker-number": "2",
        "worker-network-endpoints": "a:1:127.0.0.1,b:2:127.0.0.2,c:3:127.0.0.3",
        "tpu-env": "WORKER_ID: '2'\n",
    }

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = answers[self.path.rsplit("/", 1)[1]].encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format, *values):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        assert find_place({}) is None  # not on a TPU
        for module in (cloud_tpu_init, cloud_tpu_cluster):
            monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
        assert find_place({}) == Place("127.0.0.1:8482", 3, 2)
        answers["worker-network-endpoints"] = "a:1:127.0.0.1"
        assert find_place({}) is None
        server.shutdown()
    assert find_place({}) is None  # without a metadata server
