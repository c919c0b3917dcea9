"""Every route of a GPU; of the host device, which has one way whatever is asked for, the default and another."""

from __future__ import annotations

import pytest

from kvortex.transfer.routes import Route

ROUTES = ["auto", *(route.value for route in list(Route)[1:])]
on_every_route = pytest.mark.parametrize(
    ("device", "route"),
    [("host", "auto"), ("host", ROUTES[-1]), *(pytest.param("cuda", route, marks=pytest.mark.gpu) for route in ROUTES)],
    indirect=["device"],
)
