package e2e

// kubectlFiles are in the directory that the checks run in.
var kubectlFiles = map[string]string{
	// editor stands for a person: it replaces one word.
	"editor":    "#!/bin/sh\nsed -i \"s/${FROM:-nothing}/${TO:-nothing}/\" \"$1\"\n",
	"conf.env":  "A=1\nB=2\n",
	"conf.txt":  "some text\n",
	"bad.yaml":  "a: b: c: [",
	"cm.yaml":   "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: cm, labels: {set: one}}\ndata: {k: v}\n",
	"two.yaml":  "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: two-a, labels: {set: two}}\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: two-b, labels: {set: two}}\n",
	"kind.yaml": "apiVersion: v1\nkind: Unicorn\nmetadata: {name: x}\n",
	"deploy.yaml": `apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: skein.local/web:1
        imagePullPolicy: IfNotPresent
        ports: [{containerPort: 8080}]
        env: [{name: A, value: "1"}]
`,
	"ssa.yaml": `apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  template:
    spec:
      containers:
      - name: web
        env: [{name: B, value: "2"}]
`,
	"box.yaml": `apiVersion: v1
kind: Pod
metadata: {name: box, labels: {app: box}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - {name: lines, image: skein.local/tools:1, imagePullPolicy: IfNotPresent, args: [print, "100000", 100ms]}
  - {name: box, image: skein.local/tools:1, imagePullPolicy: IfNotPresent, stdin: true, command: [sh, -c, "while read l; do echo got $l; done; sleep 1000"]}
  - {name: web, image: skein.local/web:1, imagePullPolicy: IfNotPresent}
---
apiVersion: v1
kind: Pod
metadata: {name: dies, labels: {app: dies}}
spec:
  restartPolicy: OnFailure
  terminationGracePeriodSeconds: 0
  containers:
  - {name: c, image: skein.local/tools:1, imagePullPolicy: IfNotPresent, command: [sh, -c, "echo life; sleep 1; exit 3"]}
`,
	"rbac.yaml": `apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reconciled, namespace: access}
rules: [{apiGroups: [""], resources: [pods], verbs: [get]}]
`,
	"crd.yaml": `apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: gizmos.kubectl.example.com}
spec:
  group: kubectl.example.com
  scope: Namespaced
  names: {plural: gizmos, singular: gizmo, kind: Gizmo, shortNames: [gz]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}, scale: {specReplicasPath: .spec.size, statusReplicasPath: .status.size}}
    additionalPrinterColumns: [{name: Size, type: integer, jsonPath: .spec.size}]
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            description: What a gizmo should be.
            properties:
              size: {type: integer, minimum: 1, maximum: 10, description: How big it is.}
              color: {type: string, default: red}
          status: {type: object, properties: {size: {type: integer}}}
`,
	"gizmo.yaml":              "apiVersion: kubectl.example.com/v1\nkind: Gizmo\nmetadata: {name: g}\nspec: {size: 3}\n",
	"kust/kustomization.yaml": "namePrefix: kust-\nresources: [cm.yaml]\nconfigMapGenerator: [{name: made, literals: [a=b]}]\n",
	"kust/cm.yaml":            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: plain}\n",
	// certificate.sh makes a CSR object for $1.
	"certificate.sh": `#!/bin/sh
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$1.key" -subj "/O=team/CN=$1" -out "$1.csr" 2>/dev/null || exit 1
cat > "$1.yaml" <<X
apiVersion: certificates.k8s.io/v1
kind: CertificateSigningRequest
metadata: {name: $1}
spec: {signerName: kubernetes.io/kube-apiserver-client, usages: [client auth], request: $(base64 -w0 < "$1.csr")}
X
`,
	"evicted.yaml": "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: hold}\nspec: {minAvailable: 1, selector: {matchLabels: {app: web}}}\n",
}
