"""What is derived from the table of kinds: generated files, columns, descriptions and permissions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_operator.api.crd import root_schema
from rlhf_operator.api.decision import DECISION
from rlhf_operator.generate.__main__ import differences, main, write
from rlhf_operator.generate.outputs import outputs
from rlhf_operator.kinds import KINDS, rbac
from rlhf_operator.kinds.base import JOB, KindSpec, Resource

ROOT = Path(__file__).resolve().parents[2]
DEFINITIONS = (*KINDS, DECISION)
TOY = replace(
    KINDS[0], kind="Toy", plural="toys", singular="toy", short_names=("ty",), children=(JOB,), observed_only=()
)


def test_the_committed_files_are_what_the_code_generates() -> None:
    assert differences(ROOT, outputs(KINDS)) == ""


def test_check_fails_and_shows_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "crds").mkdir()
    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--root", str(tmp_path), "--check"]) == 0
    capsys.readouterr()

    crd = tmp_path / "crds/rlhf.dev_decisions.yaml"
    crd.write_text(crd.read_text().replace("maximum: 63", "maximum: 64"))
    (tmp_path / "crds/rlhf.dev_gone.yaml").write_text("left from a kind that is gone\n")

    assert main(["--root", str(tmp_path), "--check"]) == 1
    shown = capsys.readouterr()
    assert "-                maximum: 64\n+                maximum: 63" in shown.out
    assert "-left from a kind that is gone" in shown.out
    assert "run `make generate` and commit" in shown.err
    assert main(["--root", str(tmp_path)]) == 0
    assert not (tmp_path / "crds/rlhf.dev_gone.yaml").exists()


def test_generating_outside_of_the_repository_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--root", str(tmp_path)])
    assert "is not the repository" in capsys.readouterr().err


def test_a_further_kind_gets_its_crd_its_reference_and_its_permissions(tmp_path: Path) -> None:
    found = outputs((*KINDS, TOY))
    write(tmp_path, found)

    assert yaml.safe_load(found["crds/rlhf.dev_toys.yaml"])["spec"]["names"]["shortNames"] == ["ty"]
    assert "## Toy" in found["docs/api.md"]
    for role in ("operator", "viewer", "editor"):
        rules = yaml.safe_load(found[f"helm/rlhf-operator/files/rules-{role}.yaml"])
        assert any("toys" in rule["resources"] for rule in rules), role


@pytest.mark.parametrize("page", ["docs/api.md", "docs/metrics.md"])
def test_no_cell_of_a_reference_breaks_its_row(page: str) -> None:
    """A bar inside a cell begins the next one, and readers see the text up to it alone."""
    columns = 0
    for line in outputs(KINDS)[page].splitlines():
        found = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (columns and found) or found == columns, line
        columns = found


def test_every_image_is_in_the_metrics_reference() -> None:
    text = outputs(KINDS)["docs/metrics.md"]

    for name in (
        "rlhf_operator_reconcile_total",
        "rlhf_resource_phase",
        "rlhf_gateway_requests_total",
        "rlhf_trainer_loss",
        "vllm:request_success_total",
    ):
        assert f"`{name}`" in text


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.kind)
def test_every_printer_column_names_a_field_of_the_schema(definition: Any) -> None:
    schema = root_schema(definition)

    for column in definition.printer_columns:
        if column.json_path.startswith(".metadata."):
            continue
        assert _resolve(schema, column.json_path) in (column.type, "date-time"), column


def _resolve(schema: dict[str, Any], path: str) -> str:
    """The type at a printer column's JSONPath: .a.b, or .a[?(@.b=='c')].d."""
    for step in re.findall(r"\.(\w+)|\[\?\(@\.(\w+)==['\"]\w+['\"]\)\]", path):
        if step[0]:
            schema = schema["properties"][step[0]]
        else:
            schema = schema["items"]
            assert step[1] in schema["properties"]
    return "date-time" if schema.get("format") == "date-time" else str(schema["type"])


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.kind)
def test_every_field_of_a_spec_is_described(definition: Any) -> None:
    """`kubectl explain` has nothing else to show."""
    silent = [path for path, schema in _fields(root_schema(definition)["properties"]["spec"], "spec")]

    assert silent == []


# yaml.org/type/bool: kubectl and Argo CD read YAML 1.1, in which these keys are no text.
YAML_BOOLEANS = {"y", "n", "yes", "no", "on", "off", "true", "false"}


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.kind)
def test_no_field_is_called_what_yaml_takes_for_a_boolean(definition: Any) -> None:
    assert not YAML_BOOLEANS & {name.lower() for name in _names(root_schema(definition)["properties"]["spec"])}


def _names(schema: dict[str, Any]) -> Iterator[str]:
    for name, child in schema.get("properties", {}).items():
        yield name
        yield from _names(child)
        yield from _names(child.get("items", {}))


def _fields(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, child in schema.get("properties", {}).items():
        if not child.get("description"):
            yield f"{path}.{name}", child
        yield from _fields(child, f"{path}.{name}")
        yield from _fields(child.get("items", {}), f"{path}.{name}[]")


def allowed(rules: list[rbac.Rule], verb: str, resource: Resource) -> bool:
    return any(
        verb in rule["verbs"] and resource.group in rule["apiGroups"] and resource.plural in rule["resources"]
        for rule in rules
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_the_operator_may_do_to_children_what_the_engine_does_and_only_read_what_it_observes(kind: KindSpec) -> None:
    rules = rbac.operator_rules(KINDS)

    for child in kind.children:
        assert all(allowed(rules, verb, child) for verb in ("get", "list", "watch", "create", "patch", "delete"))
    written = {child for other in KINDS for child in other.children}
    for seen in {*kind.observed_only, *kind.related} - written:
        assert allowed(rules, "watch", seen)
        assert not any(allowed(rules, verb, seen) for verb in ("create", "update", "patch", "delete"))


def test_the_operator_cannot_touch_a_spec_a_secret_a_crd_or_anything_by_wildcard() -> None:
    rules = rbac.operator_rules(KINDS) + rbac.operator_cluster_rules() + rbac.lease_rules() + rbac.gateway_rules()

    words = {word for rule in rules for key in ("apiGroups", "resources", "verbs") for word in rule[key]}
    assert not words & {"*", "secrets", "customresourcedefinitions", "escalate", "bind", "impersonate"}
    for kind in KINDS:
        ours = Resource("rlhf.dev", "v1alpha1", kind.kind, kind.plural)
        assert not any(allowed(rules, verb, ours) for verb in ("create", "update", "patch", "delete"))


def test_editors_do_not_decide_and_deciders_do_not_undo() -> None:
    decisions = Resource("rlhf.dev", "v1alpha1", "Decision", "decisions")

    assert not any(allowed(rbac.editor_rules(KINDS), verb, decisions) for verb in rbac.EDIT)
    assert allowed(rbac.decision_maker_rules(), "create", decisions)
    assert not any(allowed(rbac.decision_maker_rules(), verb, decisions) for verb in ("update", "patch", "delete"))
