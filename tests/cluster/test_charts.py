"""The charts render what a careful platform engineer would want to see, and refuse values they do not know."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_gateway.wire import TOKEN_AUDIENCE, TOKEN_PATH
from rlhf_operator.api.decision import admission_policy, admission_policy_binding
from rlhf_operator.config import DEFAULT_PATH, Config, load
from rlhf_operator.kinds import KINDS, rbac
from tests.cluster.charts import HELM, ChartError, Charts, Rendered, helm

OPERATOR, CRDS = "rlhf-operator", "rlhf-operator-crds"


@pytest.fixture(scope="module")
def charts() -> Charts:
    return Charts()


EVERYTHING = {
    "replicas": 2,
    "watchNamespaces": ["default"],
    "networkPolicy": {"egress": {"enabled": True}},
    "tolerations": [{"key": "a", "operator": "Exists"}],
    "nodeSelector": {"a": "b"},
    "imagePullSecrets": [{"name": "pull"}],
    "priorityClassName": "system-cluster-critical",
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
    ],
    "podAnnotations": {"a": "b"},
    "serviceAccount": {"annotations": {"a": "b"}},
}


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["default", "everything"])
def test_the_api_server_takes_all_of_it_strictly(charts: Charts, kubectl, values: dict[str, Any]) -> None:
    rendered = charts.render(OPERATOR, values, namespace="default")

    done = kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", input=rendered.text)
    assert done.stdout.count("(server dry run)") == len(rendered.objects)


@pytest.fixture(scope="module")
def default(charts: Charts) -> Rendered:
    return charts.render(OPERATOR)


def pod(rendered: Rendered) -> dict[str, Any]:
    spec: dict[str, Any] = rendered.one("Deployment")["spec"]["template"]["spec"]
    return spec


def config(rendered: Rendered, tmp_path: Path) -> Config:
    """The rendered configuration, read by the operator's own reader."""
    file = tmp_path / "config.yaml"
    file.write_text(rendered.one("ConfigMap")["data"]["config.yaml"])
    return load(file)


def test_the_operator_reads_the_configuration_that_the_chart_renders(default: Rendered, tmp_path: Path) -> None:
    found = config(default, tmp_path)

    assert found == Config(
        trainer_image="docker.io/library/rlhf-trainer:0.1.0", gateway_image="docker.io/library/rlhf-operator:0.1.0"
    )


def test_every_value_of_the_configuration_arrives(charts: Charts, tmp_path: Path) -> None:
    values = {
        "image": {"repository": "example.org/op", "digest": "sha256:" + "a" * 64, "pullPolicy": "Always"},
        "trainerImage": "example.org/trainer:1",
        "watchNamespaces": ["red", "blue"],
        "config": {
            "log": {"level": "debug", "format": "text"},
            "prices": {"perHour": {"nvidia.com/gpu": 2.5}},
            "metrics": {"perObject": False},
            "workers": 3,
            "relistSeconds": 60,
            "drainSeconds": 20,
            "clusterDomain": "example.local",
            "leaderElection": {"leaseDurationSeconds": 30, "renewDeadlineSeconds": 20, "retryPeriodSeconds": 4},
            "api": {"maxInFlight": 7, "timeoutSeconds": 9},
        },
    }
    rendered = charts.render(OPERATOR, values, release="prod", namespace="ml")

    found = config(rendered, tmp_path)
    assert (found.log.level, found.log.format, found.workers, found.drain_seconds) == ("debug", "text", 3, 20)
    assert found.settings().prices.per_hour == {"nvidia.com/gpu": 2.5}
    assert (found.metrics.per_object, found.relist_seconds, found.cluster_domain) == (False, 60, "example.local")
    assert found.leader_election.lease_duration_seconds == 30
    assert (found.api.max_in_flight, found.api.timeout_seconds) == (7, 9)
    assert found.namespaces == ("red", "blue")
    assert found.gateway_image == "example.org/op@sha256:" + "a" * 64
    assert (found.operator_namespace, found.operator_service_account) == ("ml", "prod-rlhf-operator")
    assert pod(rendered)["serviceAccountName"] == "prod-rlhf-operator"
    assert pod(rendered)["terminationGracePeriodSeconds"] > found.drain_seconds


def test_a_changed_configuration_rolls_the_pods(charts: Charts, default: Rendered) -> None:
    def checksum(rendered: Rendered) -> str:
        annotations = rendered.one("Deployment")["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["checksum/config"])

    assert checksum(charts.render(OPERATOR, {"config": {"workers": 9}})) != checksum(default)
    assert checksum(charts.render(OPERATOR, {"podLabels": {"a": "b"}})) == checksum(default)


def test_the_pod_is_restricted(default: Rendered) -> None:
    spec = pod(default)
    (container,) = spec["containers"]

    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {volume["name"]: volume for volume in spec["volumes"]}["tmp"]["emptyDir"] == {"sizeLimit": "64Mi"}
    assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert container["resources"]["requests"]
    assert container["resources"]["limits"]["memory"]
    assert spec["enableServiceLinks"] is False


def test_it_is_probed_where_it_serves_and_starts_with_its_configuration(default: Rendered) -> None:
    (container,) = pod(default)["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}

    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["ports"] == [{"name": "http", "containerPort": 8080, "protocol": "TCP"}]
    assert container["args"] == ["--config", f"{mounts['config']}/config.yaml"] == ["--config", str(DEFAULT_PATH)]


def test_gateways_are_shown_a_token_that_the_api_server_does_not_take(default: Rendered) -> None:
    volumes = {volume["name"]: volume for volume in pod(default)["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod(default)["containers"][0]["volumeMounts"]}
    (source,) = volumes["gateway-token"]["projected"]["sources"]

    assert source["serviceAccountToken"]["audience"] == TOKEN_AUDIENCE
    assert f"{mounts['gateway-token']}/{source['serviceAccountToken']['path']}" == TOKEN_PATH


def test_cluster_wide_rules_are_those_of_the_table(default: Rendered) -> None:
    roles = {role["metadata"]["name"]: role["rules"] for role in default.of("ClusterRole")}

    assert roles == {
        "rlhf-operator": rbac.operator_rules(KINDS),
        "rlhf-operator-cluster": rbac.operator_cluster_rules(),
        "rlhf-operator-gateway": rbac.gateway_rules(),
        "rlhf-operator-viewer": rbac.viewer_rules(KINDS),
        "rlhf-operator-editor": rbac.editor_rules(KINDS),
        "rlhf-operator-decision-maker": rbac.decision_maker_rules(),
    }
    assert default.one("Role")["rules"] == rbac.lease_rules()
    bound = default.one("ClusterRoleBinding", "rlhf-operator")["subjects"]
    assert bound == [{"kind": "ServiceAccount", "name": "rlhf-operator", "namespace": "rlhf-system"}]


def test_for_single_namespaces_nothing_is_granted_elsewhere(charts: Charts) -> None:
    rendered = charts.render(OPERATOR, {"watchNamespaces": ["red", "blue"]})

    names = {role["metadata"]["name"] for role in rendered.of("ClusterRole")}
    assert "rlhf-operator" not in names
    roles = [role for role in rendered.of("Role") if role["metadata"]["name"] == "rlhf-operator"]
    assert [role["metadata"]["namespace"] for role in roles] == ["red", "blue"]
    assert all(role["rules"] == rbac.operator_rules(KINDS) for role in roles)
    bindings = [b for b in rendered.of("RoleBinding") if b["metadata"]["name"] == "rlhf-operator"]
    assert [b["metadata"]["namespace"] for b in bindings] == ["red", "blue"]
    groups = rendered.one("ClusterRoleBinding", "rlhf-operator-gateway")["subjects"]
    assert [group["name"] for group in groups] == ["system:serviceaccounts:red", "system:serviceaccounts:blue"]


def test_two_releases_of_a_namespace_do_not_wait_for_each_others_lease(charts: Charts, tmp_path: Path) -> None:
    """They serve different namespaces; with one Lease between them only one of the two would ever work."""
    leases = []
    for release, served in (("red", "team-red"), ("blue", "team-blue")):
        rendered = charts.render(OPERATOR, {"watchNamespaces": [served]}, release=release)
        lease = config(rendered, tmp_path).leader_election.name
        rules = rendered.one("Role", f"{release}-rlhf-operator-leader-election")["rules"]
        assert [rule["resourceNames"] for rule in rules if "resourceNames" in rule] == [[lease]]
        leases.append(lease)

    assert leases[0] != leases[1]


def test_names_that_yaml_would_take_for_numbers_stay_names(charts: Charts) -> None:
    """A namespace may be called 1234 or 1e3; unquoted, the API server would refuse the number."""
    values = {
        "watchNamespaces": ["1234", "1e3"],
        "serviceAccount": {"name": "12"},
        "priorityClassName": "7",
        "nameOverride": "0",
    }

    def scalars(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict | list):
            for key, child in node.items() if isinstance(node, dict) else enumerate(node):
                yield from scalars(child, f"{path}.{key}")
        else:
            yield path, node

    rendered = charts.render(OPERATOR, values, namespace="77")
    named = [
        (f"{body['kind']}{path}", value)
        for body in rendered.objects
        for path, value in scalars(body, "")
        if re.search(r"ame(space)?$|\.labels\.|\.matchLabels\.", path)
    ]
    assert {"77", "1234", "1e3", "12", "7", "0"} <= {value for _, value in named}
    assert [(path, value) for path, value in named if not isinstance(value, str)] == []


def test_viewers_and_editors_are_aggregated_and_deciders_never(charts: Charts, default: Rendered) -> None:
    def targets(rendered: Rendered, name: str) -> set[str]:
        labels = rendered.one("ClusterRole", f"rlhf-operator-{name}")["metadata"]["labels"]
        return {label.rpartition("-to-")[2] for label in labels if "aggregate-to-" in label}

    assert targets(default, "viewer") == {"view", "edit", "admin"}
    assert targets(default, "editor") == {"edit", "admin"}
    assert targets(default, "decision-maker") == set()
    assert targets(charts.render(OPERATOR, {"rbac": {"aggregate": False}}), "editor") == set()


def test_without_rbac_and_service_account_none_are_rendered(charts: Charts) -> None:
    own = {"rbac": {"create": False}, "serviceAccount": {"create": False, "name": "mine"}}
    rendered = charts.render(OPERATOR, own)

    kinds = {body["kind"] for body in rendered.objects}
    assert not kinds & {"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    assert pod(rendered)["serviceAccountName"] == "mine"


def test_decisions_are_bound_to_their_authors(charts: Charts, default: Rendered) -> None:
    assert default.one("ValidatingAdmissionPolicy") == admission_policy()
    assert default.one("ValidatingAdmissionPolicyBinding") == admission_policy_binding()
    without = charts.render(OPERATOR, {"decisionPolicy": {"create": False}})
    assert not without.of("ValidatingAdmissionPolicy")


@pytest.mark.parametrize(("replicas", "expected"), [(1, 0), (2, 1)])
def test_a_disruption_budget_only_where_it_does_not_block_drains(charts: Charts, replicas: int, expected: int) -> None:
    rendered = charts.render(OPERATOR, {"replicas": replicas})

    assert len(rendered.of("PodDisruptionBudget")) == expected
    assert rendered.one("Deployment")["spec"]["replicas"] == replicas


def test_only_the_http_port_is_let_in_and_egress_is_a_switch(charts: Charts, default: Rendered) -> None:
    spec = default.one("NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    assert spec["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}]}]

    peers = [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]
    values = {"networkPolicy": {"metricsFrom": peers, "egress": {"enabled": True, "apiServerPorts": [8443]}}}
    strict = charts.render(OPERATOR, values).one("NetworkPolicy")["spec"]
    assert strict["policyTypes"] == ["Ingress", "Egress"]
    assert strict["ingress"][0]["from"] == peers
    assert [port["port"] for rule in strict["egress"] for port in rule["ports"]] == [53, 53, 8443, 8080, 8001]
    assert not charts.render(OPERATOR, {"networkPolicy": {"enabled": False}}).of("NetworkPolicy")


@pytest.mark.parametrize(
    ("value", "kind", "endpoints"),
    [("serviceMonitor", "ServiceMonitor", "endpoints"), ("podMonitor", "PodMonitor", "podMetricsEndpoints")],
)
def test_a_monitor_is_a_switch_and_selects_what_is_there(
    charts: Charts, default: Rendered, value: str, kind: str, endpoints: str
) -> None:
    monitor = charts.render(OPERATOR, {value: {"enabled": True, "interval": "10s", "labels": {"release": "kps"}}})
    spec = monitor.one(kind)["spec"]

    assert not default.of(kind)
    assert monitor.one(kind)["metadata"]["labels"]["release"] == "kps"
    assert [(e["port"], e["path"], e["interval"]) for e in spec[endpoints]] == [("http", "/metrics", "10s")]
    wanted = spec["selector"]["matchLabels"].items()
    template = monitor.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert wanted <= template.items()
    assert wanted <= monitor.one("Service")["metadata"]["labels"].items()


def test_two_monitors_are_refused(charts: Charts) -> None:
    with pytest.raises(ChartError, match="enable one of them"):
        charts.render(OPERATOR, {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 2}, "additional properties 'replica' not allowed"),
        ({"image": {"name": "x"}}, "additional properties 'name' not allowed"),
        ({"config": {"logLevel": "info"}}, "additional properties 'logLevel' not allowed"),
        ({"config": {"log": {"level": "loud"}}}, "value must be one of 'debug', 'info', 'warning', 'error'"),
        ({"replicas": 0}, "minimum: got 0, want 1"),
        ({"image": {"digest": "sha256:0"}}, "does not match pattern"),
        ({"watchNamespaces": ["Red"]}, "does not match pattern"),
        ({"config": {"prices": {"perHour": {"cpu": -1}}}}, "minimum: got -1, want 0"),
        ({"serviceMonitor": {"interval": "often"}}, "does not match pattern"),
        ({"serviceAccount": {"create": False}}, "set serviceAccount.name: serviceAccount.create is false"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_values_that_make_no_sense_are_refused(charts: Charts, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ChartError, match=message):
        charts.render(OPERATOR, values)


def test_the_schema_knows_every_default_value_and_no_other() -> None:
    values = yaml.safe_load((HELM / OPERATOR / "values.yaml").read_text())
    schema = json.loads((HELM / OPERATOR / "values.schema.json").read_text())

    def compare(value: dict[str, Any], node: dict[str, Any], path: str) -> None:
        if "properties" not in node:
            return
        assert node["additionalProperties"] is False, path
        assert set(value) == set(node["properties"]) - {"global"}, path
        for key, child in value.items():
            if isinstance(child, dict):
                compare(child, node["properties"][key], f"{path}.{key}")

    compare(values, schema, "")


def test_the_crds_are_kept_on_uninstall_and_equal_the_plain_ones(charts: Charts) -> None:
    rendered = charts.render(CRDS)

    plain = {}
    for file in sorted((HELM.parent / "crds").glob("*.yaml")):
        body = yaml.safe_load(file.read_text())
        plain[body["metadata"]["name"]] = body["spec"]
    assert len(plain) == len(KINDS) + 1
    assert {crd["metadata"]["name"]: crd["spec"] for crd in rendered.objects} == plain
    keep = {"helm.sh/resource-policy": "keep"}
    assert all(crd["metadata"]["annotations"] == keep for crd in rendered.objects)


def test_a_crd_fits_into_the_annotation_of_a_client_side_apply(charts: Charts) -> None:
    for crd in charts.render(CRDS).objects:
        assert len(json.dumps(crd)) < 200_000, crd["metadata"]["name"]


@pytest.mark.parametrize("chart", [OPERATOR, CRDS])
def test_what_is_installed_does_not_differ_from_what_is_rendered(charts: Charts, kubectl, chart: str) -> None:
    """Or Argo CD would sync for ever. Kubernetes stores 1.0 as 1, drops nulls, and fills in defaults."""
    text = charts.render(chart, namespace="default").text
    apply = ("--server-side", "--field-manager=argocd-controller", "--force-conflicts", "-f", "-")
    kubectl("apply", *apply, input=text)

    again = kubectl("diff", *apply, input=text, check=False)
    assert (again.returncode, again.stdout) == (0, "")


def test_helm_installs_upgrades_and_keeps_the_crds_when_it_goes(kubeconfig, kubectl, namespace) -> None:
    """Other tests of the session have made the same cluster-wide objects: take them over."""
    take = ("upgrade", "--install", "--take-ownership", "--force-conflicts", "--namespace", namespace)
    own = "fullnameOverride=by-helm"
    helm(kubeconfig, *take, CRDS, str(HELM / CRDS))
    helm(kubeconfig, *take, "op", str(HELM / OPERATOR), "--set", own, "--set", "decisionPolicy.create=false")
    helm(kubeconfig, *take, "op", str(HELM / OPERATOR), "--set", own, "--set", "decisionPolicy.create=false,replicas=2")
    assert "2" in kubectl("-n", namespace, "get", "deployment", "by-helm", "-o", "jsonpath={.spec.replicas}").stdout
    kubectl("-n", namespace, "create", "-f", str(HELM.parent / "manifests/examples/reward-model-job.yaml"))

    helm(kubeconfig, "uninstall", "op", "--namespace", namespace)
    helm(kubeconfig, "uninstall", CRDS, "--namespace", namespace)

    assert "helpful-rm" in kubectl("-n", namespace, "get", "rmj").stdout
    assert "NotFound" in kubectl("get", "clusterrole", "by-helm", check=False).stderr
