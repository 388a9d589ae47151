"""Reproduces that XLA:CPU loses the order of collectives when an executable is loaded from the compilation cache.

    python tests/xla_cpu_order.py            prints the order at both starts and executes the program
    python tests/xla_cpu_order.py --order    prints the order only, without executing the program

Needs only jax and numpy. Exit status 1: the order is lost, 0: it is kept, 2: XLA's log has no execution graph.

Report. A program for several host devices has a collective-permute, and a `while` loop with collective-permutes that
does not depend on it. Compiled, the two are ordered. Loaded from JAX's persistent compilation cache (or by
`jax.experimental.serialize_executable`, in the same process), they are not. They then execute at the same time on
different threads, and the loaded executable aborts in rendezvous.h ("Check failed: id < num_threads (4 vs. 4)"), waits
forever, or returns wrong values without an error, depending on timing. The gradient of ring attention on four devices
was wrong without an error in 28 of 30 calls (three starts of ten calls, jax 0.10.2).

Cause. All collective thunks of a program use one communicator resource, by which ThunkExecutor orders them.
`ThunkSequenceSerDesProtobuf` (xla/backends/cpu/runtime/thunk_proto_serdes.cc) stores the users of a resource for each
thunk sequence, and `FromProto` creates a new resource for each sequence, also for the nested sequences of while,
conditional and call thunks. The loop's collectives therefore no longer share their resource with the collectives
outside, and `WhileThunk::resource_uses` conflicts with nothing. Fix: pass the resources of the outermost sequence on to
the nested ones.

Why data is exchanged. JAX gives all collective-permutes of a shard_map channel id 1. XLA:CPU uses the channel id as
`op_id` of the RendezvousKey, so only the order keeps two transfers apart. All-reduces lose the order, too: with them
the loaded program ended with a segmentation fault.

When it shows. On two, four and eight devices. Only if about ten thunks are ready at once, because ThunkExecutor uses a
second thread only then: with 7 or more of the independent sines below, not with 6. Also on one CPU, without LLVM's
optimizations, without asynchronous dispatch, and with xla_cpu_multi_thread_eigen=false. In the program below,
--xla_cpu_enable_concurrency_optimized_scheduler=false hides it, but the order is lost as well. Seen with jax and jaxlib
0.10.2 (Python 3.11) and 0.12.0.1 (Python 3.12), on x86-64 Linux.
"""

import os
import re
import subprocess
import sys
import tempfile

DEVICES, SIZE, HOPS, INDEPENDENT = 4, 1024, 9, 8


def execute(times: int) -> None:
    """Compiles the program, or loads it, and executes it. Runs in a process of its own."""
    import jax
    import numpy as np

    mesh = jax.make_mesh((DEVICES,), ("ring",))
    pairs = [(source, (source + 1) % DEVICES) for source in range(DEVICES)]

    def hop(x):
        return jax.lax.ppermute(x, "ring", pairs)

    def local(x, y, others):
        looped = jax.lax.scan(lambda x, _: (hop(x), None), x, length=HOPS)[0]
        return looped, hop(y), [jax.numpy.sin(z) for z in others]

    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=jax.P("ring"), out_specs=jax.P("ring")))
    x = np.repeat(np.arange(DEVICES, dtype=np.float32), SIZE)
    arguments = x, x + 100, [x + number for number in range(INDEPENDENT)]
    arguments = jax.device_put(arguments, jax.NamedSharding(mesh, jax.P("ring")))
    compiled = program.lower(*arguments).compile()
    right = 0
    for _ in range(times):
        looped, once, _ = compiled(*arguments)
        right += np.array_equal(looped, np.roll(x, HOPS * SIZE)) and np.array_equal(once, np.roll(x + 100, SIZE))
    print(f"{right} of {times} results are right" if times else "not executed")


def start(cache: str, times: int) -> subprocess.CompletedProcess[str]:
    """Starts a process that uses the compilation cache and logs XLA's execution graphs."""
    devices = f"--xla_force_host_platform_device_count={DEVICES} --xla_cpu_collective_call_terminate_timeout_seconds=20"
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_VMODULE": "thunk_executor=6",
    }
    command = [sys.executable, __file__, "--execute", str(times)]
    return subprocess.run(command, env=environ, capture_output=True, text=True)


def is_ordered(log: str) -> bool | None:
    """Returns whether the loop is ordered relative to the collective-permute outside it; None without a graph."""
    thunk = re.compile(r"thunk #\d+: op_name=(\S+), kind=(\S+), dependencies=\[(.*?)\]")
    for graph in log.split("ThunkExecutor execution graph:")[1:]:
        thunks = thunk.findall(graph)
        loops = [name for name, kind, _ in thunks if kind == "while"]
        outside = [name for name, kind, _ in thunks if kind == "collective"]
        if not (loops and outside):
            continue
        reached = {}  # the thunks that must have finished before each thunk starts
        for name, _, dependencies in thunks:
            direct = [each for each in dependencies.split(", ") if each]
            reached[name] = set(direct).union(*(reached[each] for each in direct))
        return all(one in reached[other] or other in reached[one] for one in loops for other in outside)
    return None


def main() -> int:
    times = 0 if "--order" in sys.argv else 20
    with tempfile.TemporaryDirectory() as cache:
        starts = {"compiled": start(cache, times), "loaded from the cache": start(cache, times)}
    ordered = [is_ordered(done.stderr) for done in starts.values()]
    for (name, done), order in zip(starts.items(), ordered, strict=True):
        failed = re.findall(r"Check failed: .*|.* may be stuck", done.stderr) or [f"exit status {done.returncode}"]
        result = done.stdout.strip() if done.returncode == 0 else failed[0]
        print(f"{name}: loop and collective-permute ordered: {order}; {result}")
    return 2 if None in ordered or not ordered[0] else int(not ordered[1])


if __name__ == "__main__":
    if "--execute" in sys.argv:
        execute(int(sys.argv[-1]))
    else:
        sys.exit(main())
