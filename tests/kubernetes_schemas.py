"""What the rendered Kubernetes files use of the published schemas, as JSON schema.

RayJob: written down by hand from KubeRay's CRD, ray-project/kuberay at commit
037e91b0e311e6240431a4dcb111fab341a6f613, ``helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml``,
version v1: field names, types, required fields and the pattern of quantities. The whole file has
1.2 million characters; of the pod's template only the fields that occur are here. Unknown fields
are refused, as ``kubectl --validate=strict`` refuses them.
Job and Service: from the Kubernetes documentation ("Job with Pod-to-Pod Communication") and the
API's reference, the fields that occur.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {
    "type": ["integer", "string"],
    "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
    r"(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
}
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}


def several(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def fields(required: tuple[str, ...] = (), **known: Schema) -> Schema:
    return {
        "type": "object",
        "properties": known,
        "required": list(required),
        "additionalProperties": False,
    }


NAMED = fields(("name",), name=TEXT)
CONTAINER = fields(
    ("name",),
    **dict.fromkeys(("name", "image", "workingDir"), TEXT),
    command=several(TEXT),
    env=several(fields(("name",), name=TEXT, value=TEXT)),
    envFrom=several(fields(secretRef=NAMED)),
    resources=fields(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=several(fields(("mountPath", "name"), mountPath=TEXT, name=TEXT)),
)
CLAIM = fields(("claimName",), claimName=TEXT)
POD = fields(
    ("containers",),
    containers=several(CONTAINER),
    nodeSelector=TEXTS,
    restartPolicy={"enum": ["Always", "Never", "OnFailure"]},
    serviceAccountName=TEXT,
    subdomain=TEXT,
    terminationGracePeriodSeconds=NUMBER,
    tolerations=several(fields(key=TEXT, operator=TEXT, effect=TEXT)),
    volumes=several(fields(("name",), name=TEXT, persistentVolumeClaim=CLAIM)),
)
TEMPLATE = fields(metadata={"type": "object"}, spec=POD)


def manifest(version: str, kind: str, spec: Schema) -> Schema:
    return fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=fields(("name",), name=TEXT, namespace=TEXT),
        spec=spec,
    )


HEAD = fields(("rayStartParams", "template"), rayStartParams=TEXTS, template=TEMPLATE)
WORKERS = fields(
    ("groupName", "maxReplicas", "minReplicas", "rayStartParams", "template"),
    groupName=TEXT,
    **dict.fromkeys(("minReplicas", "maxReplicas", "replicas"), NUMBER),
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
RAY_CLUSTER = fields(
    ("headGroupSpec",),
    autoscalerOptions=fields(idleTimeoutSeconds=NUMBER),
    enableInTreeAutoscaling=FLAG,
    headGroupSpec=HEAD,
    rayVersion=TEXT,
    workerGroupSpecs=several(WORKERS),
)
RAY_JOB = manifest(
    "ray.io/v1",
    "RayJob",
    fields(
        backoffLimit=NUMBER,
        entrypoint=TEXT,
        rayClusterSpec=RAY_CLUSTER,
        shutdownAfterJobFinishes=FLAG,
        submissionMode=TEXT,
        ttlSecondsAfterFinished=NUMBER,
    ),
)
JOB = manifest(
    "batch/v1",
    "Job",
    fields(
        ("template",),
        **dict.fromkeys(("backoffLimit", "completions", "parallelism"), NUMBER),
        completionMode={"enum": ["Indexed", "NonIndexed"]},
        template=TEMPLATE,
    ),
)
SERVICE = manifest(
    "v1",
    "Service",
    fields(clusterIP={"const": "None"}, publishNotReadyAddresses=FLAG, selector=TEXTS),
)
