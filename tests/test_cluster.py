"""Being a guest of Ray's: what it does to this process, and what is undone."""

from __future__ import annotations

import os
import signal

import pytest

from cosmic_ray import cluster


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def test_a_sigterm_is_a_ctrl_c_though_ray_has_handlers_of_its_own(ray_local, interrupt):
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, interrupt)
    try:
        cluster.connect()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
