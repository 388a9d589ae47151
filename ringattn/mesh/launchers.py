"""The number and index of a process among the processes of a run, from the environment that its launcher sets."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from jax._src import cloud_tpu_init
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
FIX = f"set {ADDRESS}=HOST:PORT of process 0, {COUNT} and {INDEX}"
TPU_PORT = 8482
FIRST_PORT, PORTS = 61440, 4096
"""Ports for jobs without a given port: a job's number, modulo `PORTS`, is added to `FIRST_PORT`."""


class Place(NamedTuple):
    """Position of a process in a run of several processes."""

    address: str
    """HOST:PORT at which process 0 listens."""
    count: int
    """Number of processes."""
    index: int
    devices: list[int] | None = None
    """Indices of the GPUs of this process among those of its host; None: all that it sees."""


def find_place(environ: Mapping[str, str]) -> Place | None:
    """Returns the place of this process; None if the process is alone.

    Reads, in this order: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; the environment of Open MPI, of
    a Slurm step, and of a TPU pod. With JAX_COORDINATOR_ADDRESS alone, a launcher gives the number and the index, and
    Kubernetes the index. Raises ValueError if the environment is incomplete.
    """
    if ADDRESS in environ:
        place = _explicit(environ)
    else:
        place = _launched(environ)
        if place is None and environ.get("JOB_COMPLETION_INDEX", "0") != "0":
            index = environ["JOB_COMPLETION_INDEX"]
            problem = f"JOB_COMPLETION_INDEX={index} is one of several processes, but {ADDRESS} is not set"
            raise ValueError(f"{problem}; set {ADDRESS}=HOST:PORT of process 0 and {COUNT} in the Job")
    if place is None or place.count == 1:
        return None
    if not 0 <= place.index < place.count:
        raise ValueError(f"process index {place.index} must be from 0 to {place.count - 1}; {FIX}")
    host, _, port = place.address.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port):
        raise ValueError(f"the address of process 0, {place.address!r}, must be HOST:PORT; {FIX}")
    return place


def _explicit(environ: Mapping[str, str]) -> Place:
    launched = None if {COUNT, INDEX} <= environ.keys() else _launched(environ, environ[ADDRESS])
    count = _number(environ, COUNT) if COUNT in environ or launched is None else launched.count
    if INDEX in environ:
        index = _number(environ, INDEX)
    elif launched is not None:
        index = launched.index
    else:
        index = _number(environ, "JOB_COMPLETION_INDEX" if "JOB_COMPLETION_INDEX" in environ else INDEX)
    return Place(environ[ADDRESS], count, index, None if launched is None else launched.devices)


def _launched(environ: Mapping[str, str], address: str = "") -> Place | None:
    """Returns the place that a launcher gives this process; None if there is none. `address` replaces the launcher's.

    Open MPI is first, because a Slurm step can start the daemons of mpirun, whose processes inherit its variables.
    """
    if environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return _open_mpi(environ, address)
    if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _slurm(environ, address)
    return _tpu_pod(environ, address)


def _open_mpi(environ: Mapping[str, str], address: str) -> Place:
    """Process 0 must run on the host of mpirun, unless `address` is given: Open MPI does not name its host."""
    if not address:
        # Before version 5: '1531576320.0;tcp://10.96.0.1,10.0.0.1:349' or '1531576320.0;tcp6://[fe80::b9b,fe80::3]:349'.
        old = re.match(r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", environ.get("OMPI_MCA_orte_hnp_uri", ""))
        namespace = re.match(r"prte\w*-(.+)-(\d+)@", environ.get("PMIX_NAMESPACE", ""))
        if old:
            host, job = old[2] or old[3], int(old[1]) // 4096  # job numbers are multiples of 4,096
        elif namespace:
            host, job = namespace[1], int(namespace[2])
        else:
            raise ValueError(f"Open MPI does not give the host of process 0; use mpirun -x {ADDRESS}=HOST:PORT")
        address = f"[{host}]:{_port(environ, job)}" if ":" in host else f"{host}:{_port(environ, job)}"
    count, index = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_RANK")
    shared = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
    return Place(address, count, index, _one_device(environ, "OMPI_COMM_WORLD_LOCAL_RANK") if shared else None)


def _slurm(environ: Mapping[str, str], address: str) -> Place:
    if not address:
        # The list starts with a host, such as 'a1,b' or 'a', or with a prefix and numbers, such as 'a[001-004,7],b'.
        hosts = re.match(r"([^,\[]+)(?:\[(\d+))?", environ.get("SLURM_STEP_NODELIST", ""))
        if hosts is None:
            raise ValueError(f"SLURM_STEP_NODELIST does not name the host of process 0; {FIX}")
        job = 31 * _number(environ, "SLURM_JOB_ID") + _number(environ, "SLURM_STEP_ID", "0")
        address = f"{hosts[1]}{hosts[2] or ''}:{_port(environ, job)}"
    count, index = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID")
    shared = count > _number(environ, "SLURM_STEP_NUM_NODES", str(count))
    return Place(address, count, index, _one_device(environ, "SLURM_LOCALID") if shared else None)


def _tpu_pod(environ: Mapping[str, str], address: str) -> Place | None:
    """Reads the environment that GKE sets, or the metadata of a Cloud TPU VM."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    if hosts:
        slices, hosts = _number(environ, "MEGASCALE_NUM_SLICES", "1"), hosts.split(",")
        if slices * len(hosts) == 1:
            return None
        index = len(hosts) * _number(environ, "MEGASCALE_SLICE_ID", "0") + _number(environ, "TPU_WORKER_ID")
        first = environ.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).partition(":")[0]
        return Place(address or f"{first}:{_given_port(environ) or TPU_PORT}", slices * len(hosts), index)
    try:
        if not cloud_tpu_init.running_in_cloud_tpu_vm or not GceTpuCluster.is_env_present():
            return None
    except (ImportError, OSError):  # a TPU without a metadata server
        return None
    address = address or GceTpuCluster.get_coordinator_address(300, environ.get("JAX_COORDINATOR_PORT"))
    return Place(address, GceTpuCluster.get_process_count(), GceTpuCluster.get_process_id())


def _one_device(environ: Mapping[str, str], variable: str) -> list[int] | None:
    """Returns the GPU of a process that shares its host with others; None if its launcher lets it see only one."""
    if re.fullmatch("[^,]+", environ.get("CUDA_VISIBLE_DEVICES", "")) or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    return [_number(environ, variable)]


def _port(environ: Mapping[str, str], job: int) -> int:
    return _given_port(environ) or FIRST_PORT + job % PORTS


def _given_port(environ: Mapping[str, str]) -> int:
    return _number(environ, "JAX_COORDINATOR_PORT", "0")


def _number(environ: Mapping[str, str], variable: str, default: str | None = None) -> int:
    value = environ.get(variable, default)
    if value is None:
        raise ValueError(f"cannot join the other processes: {variable} is not set; {FIX}")
    if not re.fullmatch("[0-9]{1,9}", value):
        raise ValueError(f"{variable}={value} must be a number; {FIX}")
    return int(value)
