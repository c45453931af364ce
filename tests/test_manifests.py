"""Tests the Kubernetes manifests in scripts/kubernetes against the schemas of Kubernetes' API."""

import kubernetes_validate
import pytest
import yaml

from disco_jax.errors import EXIT_PEER_LOST, EXIT_PREEMPTED, EXIT_USER
from tests.small_run import ROOT

FOLDER = ROOT / "scripts/kubernetes"
VERSION = "1.31"  # of Kubernetes


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def jobs() -> list[tuple[str, dict]]:
    """Returns the name and the Job of each manifest; a JobSet holds the templates of Jobs."""
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        for each in documents(path.name):
            if each["kind"] == "Job":
                found.append((path.name, each))
            if each["kind"] == "JobSet":
                template = each["spec"]["replicatedJobs"][0]["template"]
                head = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
                found.append((path.name, head | {"spec": template["spec"]}))
    return found


JOBS = jobs()


@pytest.mark.parametrize(("name", "job"), JOBS, ids=[name for name, _ in JOBS])
def test_jobs_are_valid_and_agree_with_the_exit_codes(name, job):
    kubernetes_validate.validate(job, VERSION, strict=True)
    failed, ignored, _ = job["spec"]["podFailurePolicy"]["rules"]
    assert failed["onExitCodes"]["values"] == [EXIT_USER]
    assert ignored["onExitCodes"]["values"] == [EXIT_PREEMPTED, EXIT_PEER_LOST]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert failed["onExitCodes"]["containerName"] == container["name"]
    env = {variable["name"]: variable["value"] for variable in container.get("env", [])}
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    if "google.com/tpu" not in container["resources"]["limits"]:  # GKE tells them otherwise
        assert env["JAX_NUM_PROCESSES"] == str(job["spec"]["completions"])
    assert container["command"][:2] == ["python", "train.py"]


def test_an_invalid_job_is_found():
    job = JOBS[0][1]
    bad = job | {"spec": job["spec"] | {"completion": 8}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(bad, VERSION, strict=True)


def test_the_service_gives_names_to_the_pods_of_the_job():
    service, job = documents("job.yaml")
    kubernetes_validate.validate(service, VERSION, strict=True)
    pods = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pods["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    (address,) = (
        variable["value"]
        for variable in pods["containers"][0]["env"]
        if variable["name"] == "JAX_COORDINATOR_ADDRESS"
    )
    assert address.startswith(f"{job['metadata']['name']}-0.{service['metadata']['name']}:")


@pytest.mark.parametrize("name", ["jobset_gpu.yaml", "jobset_tpu.yaml"])
def test_a_jobset_has_one_job_whose_pods_find_the_first(name):
    (jobset,) = documents(name)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"].keys() == {"network", "failurePolicy", "replicatedJobs"}
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 1
    env = job["template"]["spec"]["template"]["spec"]["containers"][0]["env"]
    address = next((x["value"] for x in env if x["name"] == "JAX_COORDINATOR_ADDRESS"), None)
    if address:  # https://jobset.sigs.k8s.io/docs/concepts: names of pods
        name = jobset["metadata"]["name"]
        assert address.startswith(f"{name}-{job['name']}-0-0.{name}:")
