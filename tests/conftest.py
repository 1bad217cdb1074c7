"""`pytestmark = pytest.mark.float64` runs a module of identities: double precision, and little optimisation, since compilation is their cost.

Everything else runs as users do.
"""

import gc
import os
import shutil
import tempfile
import time

import jax
import pytest

# Tests run side by side, a process for each core, so that threads within one gain nothing; and the thread pool of XLA's CPU backend has been seen
# to wait for ever, under load, in a computation of this suite (jaxlib 0.10.1). Read when JAX first computes.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")


# Compilation is most of what this suite costs: what takes long is compiled once for all tests, their processes and the commands they run.
FOLDER = "JAX_COMPILATION_CACHE_DIR"
CACHE = {"jax_persistent_cache_min_compile_time_secs": 0.2, "jax_persistent_cache_min_entry_size_bytes": -1}


def pytest_configure(config):
    if FOLDER not in os.environ:  # in the first process; the others inherit it
        config.compiled = os.environ[FOLDER] = tempfile.mkdtemp(prefix="forwardgrad-tests-")
        # XLA doubts, at length, that what it compiled a moment ago fits the machine
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name, value in {FOLDER.lower(): os.environ[FOLDER], **CACHE}.items():
        os.environ[name.upper()] = str(value)  # for commands
        jax.config.update(name, value)
    config.addinivalue_line(
        "markers", "float64: run in double precision (identities to 1e-10), with little optimisation"
    )
    config.addinivalue_line(
        "markers", "quick_compile: run with little optimisation (what is tested takes no time to run)"
    )


def pytest_unconfigure(config):
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _forget_what_was_compiled():
    """What a module's tests compiled serves no other module, and gigabytes of it slow down everything."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Around set-up too, so that session fixtures are made in the precision of the first test that asks for them."""
    identities = item.get_closest_marker("float64") is not None
    quick = identities or item.get_closest_marker("quick_compile") is not None
    with jax.enable_x64(identities):
        _compile_quickly(quick)
        try:
            return (yield)
        finally:
            _compile_quickly(False)


STARTED, HUNG = {}, []  # in the process that hands out the tests


def pytest_runtest_logstart(nodeid):
    STARTED[nodeid] = time.monotonic()


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report, sched):
    """A test that hung once runs again, and the summary names it: XLA's CPU backend may wait for ever, every thread idle (jaxlib 0.10.1; see above).

    A process that died of anything but the time limit is a failure, and so is a test that hangs twice.
    """
    # the worker counts from a moment before this process hears of the start; one that died before any test did not hang
    lasted = time.monotonic() - STARTED.get(crashitem, time.monotonic())
    hung = lasted >= float(sched.config.getini("faulthandler_timeout")) - 10
    if hung and crashitem not in HUNG:
        HUNG.append(crashitem)
        report.outcome = "hung"
        sched.mark_test_pending(crashitem)


def pytest_terminal_summary(terminalreporter):
    for nodeid in HUNG:
        terminalreporter.write_line(f"hung, and ran again: {nodeid} (the stack of every thread is above)")


def _compile_quickly(on):
    """Here and in the commands that a test runs."""
    jax.config.update("jax_disable_most_optimizations", on)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(on)
