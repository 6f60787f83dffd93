"""Being a guest of Ray's: what it does to this process, and what is undone."""

from __future__ import annotations

import os
import signal

import pytest

from cosmic_ray import cluster


@pytest.mark.slow
def test_a_sigterm_is_a_ctrl_c_though_ray_has_handlers_of_its_own(ray_local):
    before = signal.getsignal(signal.SIGTERM)
    try:
        cluster.connect()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
