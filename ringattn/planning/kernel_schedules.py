"""Compiles attention kernels for an absent TPU, each alone, and reads their schedules.

The compiler writes schedules only if a flag is set before it is loaded, and writes thousands of files per program.
`kernel_schedules` therefore starts this module as another process, with a temporary directory for the files.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp

from ringattn.attn.kernels.protocol import KV, Kernel, LogitSpec, Queries, QueryGrads, Residuals
from ringattn.attn.kernels.registry import choose_kernel
from ringattn.attn.mask import Runs, Tokens
from ringattn.attn.softmax import Partial
from ringattn.cost.attention_kernels import KernelSpec
from ringattn.cost.cycles import KernelSchedule, kernel_schedule
from ringattn.planning.devices import devices_of
from ringattn.runs.signals import before_ending
from ringattn.units import first_line

DUMP = "RINGATTN_DUMP"
"""Environment variable with the directory of the compiler's files."""
SPLASH_TILE = 512
"""Queries and keys in a tile of splash attention."""


Found = Iterator[tuple[KernelSpec, KernelSchedule | str]]
"""Yields a kernel and its schedule, or the reason for its absence, as soon as it is compiled."""


@contextmanager
def compiling_kernels(topology: str, specs: Sequence[KernelSpec]) -> Iterator[Found]:
    """Starts to compile the kernels in another process, which ends with the context; yields the results as they come.

    `topology` is one such as 'v5e:2x4'; the kernels are compiled for one of its devices. Reading the results raises
    ValueError if the other process fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        flags = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        environ = os.environ | {DUMP: directory, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
        root = str(Path(__file__).parents[2])
        environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", __name__, topology, json.dumps([asdict(spec) for spec in specs])]
        with (
            open(Path(directory) / "errors", "w+", encoding="utf-8") as errors,
            subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):

            def remove() -> None:
                process.kill()
                process.wait()
                shutil.rmtree(directory, ignore_errors=True)

            try:
                with before_ending(remove, immediately=True):
                    yield _results(topology, specs, process, errors)
            finally:
                process.kill()


def _results(topology: str, specs: Sequence[KernelSpec], process: subprocess.Popen[str], errors: IO[str]) -> Found:
    assert process.stdout is not None
    for spec in specs:
        line = process.stdout.readline()
        if not line:
            process.wait()
            errors.seek(0)
            raise ValueError(f"compiling kernels for {topology} failed: {errors.read().strip()[-500:]}")
        found = json.loads(line)
        yield spec, found if isinstance(found, str) else KernelSchedule(*found)


def kernel_schedules(topology: str, specs: Sequence[KernelSpec]) -> Found:
    """Compiles the kernels and yields the results: see `compiling_kernels`."""
    with compiling_kernels(topology, specs) as results:
        yield from results


def _main(topology: str, specs: Sequence[KernelSpec]) -> None:
    """Prints one line of JSON per spec: the schedule, or the reason why there is none."""
    device = devices_of(topology)[0]
    directory = Path(os.environ[DUMP])
    for spec in specs:
        try:
            compile_kernel(spec, device)
            found = _read_schedule(directory, spec)
        except Exception as error:  # of any library; a kernel that does not compile is reported
            found = first_line(error)
        print(json.dumps(found), flush=True)
        for path in directory.glob("*.txt"):
            path.unlink(missing_ok=True)


def _read_schedule(directory: Path, spec: KernelSpec) -> KernelSchedule:
    names = {
        "ringattn": f"ringattn_{spec.direction}",
        "splash": {"forward": "_fwd_", "backward": "_dkv_"}[spec.direction],
    }
    pattern = f"{glob.escape(str(directory))}/*{names[spec.kernel]}*-final_bundles.txt"
    # The name of an annotated copy of the same text has "schedule-analysis" in it.
    paths = [path for path in sorted(glob.glob(pattern)) if "schedule-analysis" not in path]
    if not paths:
        raise ValueError("the compiler wrote no schedule for this kernel")
    skips_steps = (spec.kernel, spec.direction) == ("ringattn", "forward")
    return kernel_schedule(Path(paths[-1]).read_text(encoding="utf-8"), skips_steps)


def compile_kernel(spec: KernelSpec, device: Any) -> None:
    """Compiles a kernel, for absent arrays."""
    sharding = jax.NamedSharding(jax.sharding.Mesh([device], ("device",)), jax.P())

    def array(*shape: int, dtype: str = spec.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    if spec.kernel == "splash":
        return _compile_splash(spec, array)
    shape = {"heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim, "dtype": spec.dtype}
    chosen = choose_kernel("pallas", **shape, device_kind=device.device_kind)
    _compile_ringattn(chosen.kernel, spec, array)


def _compile_ringattn(kernel: Kernel, spec: KernelSpec, array: Any) -> None:
    G, R, L, M, D = spec.kv_heads, spec.heads // spec.kv_heads, spec.queries, spec.keys, spec.head_dim

    def tokens(length: int) -> Tokens:
        segments = array(1, length, dtype="int32") if spec.segments else None
        return Tokens(array(1, length, dtype="int32"), segments, None, Runs(spec.run, 1))

    logits = LogitSpec(spec.mask, D**-0.5)
    queries = Queries(array(1, G, R, L, D), tokens(L))
    kv = KV(array(1, G, M, D), array(1, G, M, D), tokens(M))
    wide, row = array(1, G, R, L, D, dtype="float32"), array(1, G, R, L, dtype="float32")
    if spec.direction == "forward":

        def forward(queries: Queries, kv: KV, carry: Partial) -> Partial:
            return kernel.forward(logits, queries, kv, None, carry)

        jax.jit(forward, donate_argnums=2).lower(queries, kv, Partial(wide, row)).compile()
    else:

        def backward(queries: Queries, kv: KV, residuals: Residuals, carry: QueryGrads) -> Any:
            return kernel.backward(logits, queries, kv, None, residuals, carry)

        residuals = Residuals(row, row, queries.query, queries.query)
        jax.jit(backward, donate_argnums=3).lower(queries, kv, residuals, QueryGrads(wide, None)).compile()


def _compile_splash(spec: KernelSpec, array: Any) -> None:
    """Compiles JAX's splash attention: one kernel for each K/V head, with the query heads that share it."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, shared = (spec.queries, spec.keys), spec.heads // spec.kv_heads
    if spec.window is not None:
        mask = masks.LocalMask(shape, (spec.window, 0), 0)
    else:
        mask = masks.CausalMask(shape) if spec.causal else masks.FullMask(shape)
    sizes = dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), SPLASH_TILE)
    sizes |= dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), SPLASH_TILE)
    kernel = splash.make_splash_mqa(
        masks.MultiHeadMask([mask] * shared),
        block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=True),
        head_shards=1,
        q_seq_shards=1,
    )
    ids = None
    if spec.segments:
        ids = splash.SegmentIds(array(spec.queries, dtype="int32"), array(spec.keys, dtype="int32"))

    def forward(query: Any, key: Any, value: Any, ids: Any) -> Any:
        return jax.vmap(kernel, in_axes=(0, 0, 0, None))(query, key, value, ids)

    def backward(query: Any, key: Any, value: Any, ids: Any, grad: Any) -> Any:
        return jax.vjp(lambda query, key, value: forward(query, key, value, ids), query, key, value)[1](grad)

    query = array(spec.kv_heads, shared, spec.queries, spec.head_dim)
    key = array(spec.kv_heads, spec.keys, spec.head_dim)
    if spec.direction == "forward":
        jax.jit(forward).lower(query, key, key, ids).compile()
    else:
        jax.jit(backward).lower(query, key, key, ids, query).compile()


if __name__ == "__main__":
    _main(sys.argv[1], [KernelSpec(**fields) for fields in json.loads(sys.argv[2])])
