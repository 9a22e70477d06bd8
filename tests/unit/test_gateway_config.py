"""The configuration: in force at once, last good one kept, and what a change does to answers in flight."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from rlhf_gateway.config_watch import ConfigError, parse
from rlhf_gateway.openai import answers
from rlhf_gateway.settings import Settings, SettingsError
from rlhf_gateway.wire import GatewayConfig
from tests.unit.gateway_world import eventually, secret_filter, talks_on, world

HALF = {"canary_weight_percent": 50.0}
ON_CANARY = talks_on("canary", 50.0, 5)


async def test_a_new_weight_is_in_force_and_echoed() -> None:
    async with world() as w:
        await w.configure(canary_weight_percent=12.5)
        state = await w.state()
        assert (state.generation, state.canary_weight_percent, state.errors) == (1, 12.5, ())


async def test_a_configuration_there_before_the_gateway_is_found() -> None:
    async with world() as w:
        w.api.config_map = None
        w.api.put(GatewayConfig(generation=7, rollout="desk", salt="s", stage=0).to_json(), kind="ADDED")
        await eventually(lambda: w.gateway.state.generation == 7)


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"generation": 2, "rollout": "r", "salt": "s", "stage": 0, "canaryWeightPercent": 101}']
)
async def test_a_bad_configuration_leaves_the_last_good_one_in_force(text: str) -> None:
    async with world() as w:
        await w.configure(**HALF)
        w.api.put(text)
        await eventually(lambda: w.gateway.state.config_error)
        state = await w.state()
        assert state.generation == 1
        assert "gateway.json" in state.errors[0]
        assert (await w.ask(ON_CANARY[0])).headers["X-RLHF-Arm"] == "canary"
        await w.configure()
        assert (await w.state()).errors == ()


def test_a_config_map_without_the_key_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"ConfigMap gw has no key gateway\.json"):
        parse({"metadata": {"name": "gw"}, "data": {}})


async def test_a_deleted_config_map_stops_nothing() -> None:
    async with world() as w:
        config = await w.configure(**HALF)
        w.api.put(config.to_json(), kind="DELETED")
        await eventually(lambda: w.gateway.state.config_error)
        assert (await w.ask(ON_CANARY[0])).status == 200


async def test_a_watch_too_old_is_listed_again() -> None:
    async with world() as w:
        await w.configure()
        lists = w.api.lists
        w.api.gone = True
        w.api.send(None)  # the server ends the watch; the next one answers 410
        await eventually(lambda: w.api.lists > lists and w.api.watched)
        await w.configure(**HALF)


async def test_an_outage_of_the_api_server_stops_nothing_and_is_healed() -> None:
    async with world() as w:
        await w.configure(**HALF)
        w.api.down = True
        w.api.send(None)
        await eventually(lambda: not w.api.watched)
        assert (await w.ask(ON_CANARY[0])).status == 200
        config = GatewayConfig(generation=9, rollout="desk", salt="s", stage=1, stable=w.stable.backend)
        w.api.write(config)
        w.api.down = False
        await eventually(lambda: w.gateway.state.generation == 9)


async def test_bookmarks_move_the_watch_and_change_nothing() -> None:
    async with world() as w:
        await w.configure(**HALF)
        w.api.send({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "99"}}})
        await w.configure(canary_weight_percent=0.0)
        assert w.gateway.state.generation == 2


async def test_in_drain_mode_an_answer_begun_is_finished_on_its_arm() -> None:
    async with world() as w:
        await w.configure(**HALF)
        w.canary.hold = asyncio.Event()
        asking = asyncio.create_task(w.ask(ON_CANARY[0], stream=True))
        await eventually(lambda: w.canary.calls)
        await w.configure(canary_weight_percent=0.0)
        assert (await w.state()).in_flight == {"rev-canary": 1}
        w.canary.hold.set()
        response = await asking
        assert response.headers["X-RLHF-Arm"] == "canary"
        assert (await response.read()).endswith(b"[DONE]\n\n")
        assert (await w.ask(ON_CANARY[0])).headers["X-RLHF-Arm"] == "stable"


@pytest.mark.parametrize("stream", [False, True])
async def test_in_sever_mode_answers_in_flight_are_cut_at_once(stream: bool) -> None:
    async with world() as w:
        await w.configure(**HALF)
        w.canary.hold = asyncio.Event()
        asking = asyncio.create_task(w.ask(ON_CANARY[0], stream=stream))
        await eventually(lambda: w.canary.calls)
        await asyncio.sleep(0.05)  # lets the first token of the stream through to the user
        await w.configure(canary_weight_percent=0.0, rollback_mode="sever")
        response = await asking
        if stream:  # tokens had been sent: told that the answer is cut
            assert response.headers["X-RLHF-Arm"] == "canary"
            assert b"was cut" in await response.read()
        else:
            assert response.headers["X-RLHF-Fallback"] == "severed"
            assert answers("application/json", await response.read()) == ("thank you for asking",)
        (row,) = [row for row in (await w.pull()).counts if row.arm == "canary"]
        assert (row.requests, row.failures) == (1, 0)


async def test_promotion_cuts_nothing_even_in_sever_mode() -> None:
    async with world() as w:
        await w.configure(**HALF, rollback_mode="sever")
        w.canary.hold = asyncio.Event()
        asking = asyncio.create_task(w.ask(ON_CANARY[0], stream=True))
        await eventually(lambda: w.canary.calls)
        await w.configure(stable=w.canary.backend, canary=None, rollback_mode="sever")
        w.canary.hold.set()
        assert (await (await asking).read()).endswith(b"[DONE]\n\n")


async def test_a_filter_that_is_not_the_pinned_one_is_not_used(tmp_path: Path) -> None:
    async with world() as w:
        source = secret_filter(tmp_path).model_copy(update={"digest": "sha256:" + "0" * 64})
        await w.configure(**HALF, safety_filter=source)
        await eventually(lambda: w.gateway.state.safety.error)
        state = await w.state()
        assert state.safety_filter is None
        assert "is pinned" in state.errors[0]


async def test_a_missing_filter_is_retried_until_its_claim_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_gateway.app.FILTER_RETRY_SECONDS", 0.05)
    async with world() as w:
        source = secret_filter(tmp_path)
        os.rename(source.path, f"{source.path}.later")
        await w.configure(**HALF, safety_filter=source)
        await eventually(lambda: w.gateway.state.safety.error)
        assert "is its claim mounted" in (await w.state()).errors[0]
        os.rename(f"{source.path}.later", source.path)
        await eventually(lambda: w.gateway.state.safety.digest == source.digest)
        assert (await w.state()).errors == ()


ENV = {
    "ROLLOUT": "desk", "NAMESPACE": "ns", "CONFIGMAP": "gw", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "POD_UID": "u",
    "OPERATOR_NAMESPACE": "ops", "OPERATOR_SERVICE_ACCOUNT": "op", "ANSWER_TIMEOUT_SECONDS": "7", "SHADOW_LIMIT": "3",
    "MAX_CONVERSATIONS": "9", "RECORD_SHARE": "0.5", "DRAIN_ACCEPT_SECONDS": "1", "DRAIN_ANSWER_SECONDS": "2",
    "DRAIN_EVIDENCE_SECONDS": "3",
}  # fmt: skip


def test_every_setting_is_read_from_its_variable() -> None:
    settings = Settings.from_env(ENV)
    assert (settings.rollout, settings.namespace, settings.config_map, settings.pod_uid) == ("desk", "ns", "gw", "u")
    assert settings.operator_username == "system:serviceaccount:ops:op"
    assert settings.api.url == "https://10.0.0.1:443"
    assert (settings.limits.total_seconds, settings.shadow_limit, settings.max_conversations) == (7.0, 3, 9)
    assert (settings.record_share, settings.drain_accept_seconds) == (0.5, 1.0)
    assert (settings.drain_answer_seconds, settings.drain_evidence_seconds) == (2.0, 3.0)


@pytest.mark.parametrize("name", ["ROLLOUT", "NAMESPACE", "CONFIGMAP", "KUBERNETES_SERVICE_HOST"])
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is not set"):
        Settings.from_env({key: value for key, value in ENV.items() if key != name})


@pytest.mark.parametrize(
    ("name", "value"), [("RECORD_SHARE", "2"), ("SHADOW_LIMIT", "no"), ("ANSWER_TIMEOUT_SECONDS", "-1")]
)
def test_a_senseless_number_is_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is '{value}': use a number"):
        Settings.from_env(ENV | {name: value})
