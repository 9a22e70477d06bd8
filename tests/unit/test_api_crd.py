"""CustomResourceDefinitions: names, columns, the envelope every object has, and YAML that every parser reads alike."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

import pytest
import yaml
from pydantic import Field

from rlhf_operator.api.crd import PlainColumn, PlainResource, custom_resource_definition
from rlhf_operator.api.meta import ApiSpec, ApiStatus, Cel
from rlhf_operator.api.structural import NotStructuralError
from rlhf_operator.generate.reference import api_reference
from rlhf_operator.generate.text import to_yaml


class ToySpec(ApiSpec):
    size: Annotated[int, Field(ge=1, le=9)] = Field(3, description="How many | or none.")


class ToyStatus(ApiStatus):
    n: int
    y: str = ""


class Toy(ApiSpec):
    """A toy."""

    metadata: dict[str, Any] = Field(default_factory=dict)
    spec: ToySpec
    status: ToyStatus | None = None
    cel_rules: ClassVar[tuple[Cel, ...]] = (Cel("self.spec.size != 7", "spec.size must not be 7: choose another"),)


TOY = PlainResource(
    model=Toy,
    kind="Toy",
    plural="toys",
    singular="toy",
    short_names=("ty",),
    printer_columns=(PlainColumn("Size", "integer", ".spec.size"), PlainColumn("N", "integer", ".status.n", 1)),
)


def test_names_columns_and_subresources_come_from_the_definition() -> None:
    crd = custom_resource_definition(TOY)
    version = crd["spec"]["versions"][0]

    assert crd["metadata"] == {"name": "toys.rlhf.dev"}
    assert crd["spec"]["names"] == {
        "kind": "Toy",
        "listKind": "ToyList",
        "plural": "toys",
        "singular": "toy",
        "shortNames": ["ty"],
        "categories": ["rlhf"],
    }
    assert version["subresources"] == {"status": {}}
    assert [column["name"] for column in version["additionalPrinterColumns"]] == ["Size", "N", "Age"]
    assert version["additionalPrinterColumns"][1]["priority"] == 1


def test_the_root_has_the_envelope_the_name_rule_and_the_models_rules() -> None:
    schema = custom_resource_definition(TOY)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]

    assert schema["properties"]["metadata"] == {"type": "object"}
    assert schema["required"] == ["spec"]
    messages = [rule["message"] for rule in schema["x-kubernetes-validations"]]
    assert re.match("metadata.name must be at most 40 characters", messages[0])
    assert messages[1:] == ["spec.size must not be 7: choose another"]


def test_without_a_status_there_is_no_status_subresource() -> None:
    class Plain(ApiSpec):
        spec: ToySpec

    version = custom_resource_definition(PlainResource(Plain, "Plain", "plains", "plain", (), ()))["spec"]["versions"][
        0
    ]

    assert "subresources" not in version


def test_a_model_must_have_a_spec_and_nothing_beside_it() -> None:
    class NoSpec(ApiSpec):
        size: int = 1

    class Extra(ApiSpec):
        spec: ToySpec
        size: int = 1

    with pytest.raises(NotStructuralError, match="has no field spec"):
        custom_resource_definition(PlainResource(NoSpec, "NoSpec", "nospecs", "nospec", (), ()))
    with pytest.raises(NotStructuralError, match=r"fields \['size'\] beside spec; move them into spec"):
        custom_resource_definition(PlainResource(Extra, "Extra", "extras", "extra", (), ()))


def test_yaml_reads_back_and_quotes_what_kubernetes_takes_for_booleans() -> None:
    crd = custom_resource_definition(TOY)
    text = to_yaml({"crd": crd, "again": crd})

    assert yaml.safe_load(text) == {"crd": crd, "again": crd}
    assert "&id" not in text
    assert "- 'n'" in text
    assert "'y':" in text


def test_the_reference_shows_type_default_and_rules() -> None:
    text = api_reference([TOY])

    assert "| `size` | integer in [1, 9] | `3` | How many \\| or none. |" in text
    assert "| `n` | integer | required |  |" in text
    assert "- `.`: spec.size must not be 7: choose another" in text
