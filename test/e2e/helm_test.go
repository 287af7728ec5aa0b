package e2e

// helmChart is what the checks of Helm install: a Deployment and what belongs to it, a custom kind, hooks and a test.
var helmChart = map[string]string{
	"chart/Chart.yaml":  "apiVersion: v2\nname: chart\nversion: 1.0.0\nappVersion: \"1\"\ndescription: A chart to try a cluster with.\n",
	"chart/values.yaml": "greeting: one\nreplicas: 1\nimage: skein.local/web:1\n",
	"chart/crds/thing.yaml": `apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: things.helm.example.com}
spec:
  group: helm.example.com
  scope: Namespaced
  names: {plural: things, singular: thing, kind: Thing}
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, properties: {spec: {type: object, properties: {what: {type: string}}}}}}
`,
	"chart/templates/all.yaml": `apiVersion: v1
kind: ConfigMap
metadata: {name: "{{ .Release.Name }}-conf"}
data: {greeting: {{ .Values.greeting }}, revision: "{{ .Release.Revision }}", kube: {{ .Capabilities.KubeVersion.Version }}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: "{{ .Release.Name }}-web"}
spec:
  replicas: {{ .Values.replicas }}
  selector: {matchLabels: {app: "{{ .Release.Name }}"}}
  template:
    metadata: {labels: {app: "{{ .Release.Name }}"}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: web
        image: {{ .Values.image }}
        imagePullPolicy: IfNotPresent
        env: [{name: GREETING, value: {{ .Values.greeting }}}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: "{{ .Release.Name }}-web"}
spec: {selector: {app: "{{ .Release.Name }}"}, ports: [{port: 80, targetPort: 8080}]}
{{- if .Capabilities.APIVersions.Has "helm.example.com/v1" }}
---
apiVersion: helm.example.com/v1
kind: Thing
metadata: {name: "{{ .Release.Name }}-thing"}
spec: {what: {{ .Values.greeting }}}
{{- end }}
`,
	"chart/templates/hooks.yaml": `{{- range $hook := list "pre-install" "post-upgrade" }}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: "{{ $.Release.Name }}-{{ $hook }}"
  annotations: {helm.sh/hook: {{ $hook }}, helm.sh/hook-delete-policy: before-hook-creation}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      containers: [{name: c, image: "skein.local/tools:1", imagePullPolicy: IfNotPresent, command: [sh, -c, "echo {{ $hook }}"]}]
{{- end }}
`,
	"chart/templates/test.yaml": `apiVersion: v1
kind: Pod
metadata:
  name: "{{ .Release.Name }}-test"
  annotations: {helm.sh/hook: test, helm.sh/hook-delete-policy: before-hook-creation}
spec:
  restartPolicy: Never
  containers: [{name: c, image: "skein.local/tools:1", imagePullPolicy: IfNotPresent, command: [wget, -qO-, "http://{{ .Release.Name }}-web/healthz"]}]
`,
}

// helmChecks are Helm's commands, in the life of a release.
var helmChecks = []check{
	ok("helm version", `v4\.`),
	ok("helm lint chart", "0 chart\\(s\\) failed"),
	ok("helm template rel chart", "kind: Deployment", "greeting: one"),
	ok("helm install rel chart --dry-run=server", "pending-install|STATUS", "kind: Job"),
	ok("helm install rel chart --wait --timeout 60s", "^STATUS: deployed", "^REVISION: 1"),
	ok("k get deploy rel-web", `^rel-web +1/1`),
	ok("k get job rel-pre-install -o jsonpath={.status.succeeded}", "^1$"),
	ok("k get crd things.helm.example.com -o name", "things"),
	ok("k get cm rel-conf -o jsonpath='{.data.greeting} {.data.kube}'", `^one v1\.36\.3\+skein$`),
	bad(1, "helm install rel chart", "cannot re-use a name|cannot reuse a name"),
	ok("helm list", `^rel\s+helm\s+1\s.*deployed\s+chart-1\.0\.0`),
	ok("helm status rel", "^STATUS: deployed"),
	ok("helm get manifest rel", "kind: Service"),
	ok("helm get hooks rel", "pre-install"),
	ok("helm test rel --timeout 60s", `Phase:\s+Succeeded`),
	ok("k get secret -l owner=helm -o name", `secret/sh\.helm\.release\.v1\.rel\.v1`),
	ok("helm upgrade rel chart --set greeting=two,replicas=2 --wait --timeout 60s", "^REVISION: 2", "has been upgraded"),
	ok("k get cm rel-conf -o jsonpath='{.data.greeting} {.data.revision}' && k get deploy rel-web", "^two 2", `^rel-web +2/2|rel-web +2/2`),
	ok("k get thing rel-thing -o jsonpath={.spec.what}", "two"),
	ok("k get job rel-post-upgrade -o jsonpath={.status.succeeded}", "^1$"),
	ok("helm get values rel", "greeting: two"),
	bad(1, "helm upgrade rel chart --set image=skein.local/nope:1 --wait --timeout 6s --rollback-on-failure", "rel.*failed|failed.*roll|rolled back"),
	ok("helm history rel", `failed`, `Rollback to 2|Rollback`),
	soon("k get deploy rel-web -o jsonpath='{.spec.template.spec.containers[0].image} {.status.readyReplicas}'", `^skein.local/web:1 2$`),
	ok("helm rollback rel 1 --wait --timeout 60s", "Rollback was a success"),
	ok("k get cm rel-conf -o jsonpath={.data.greeting} && k get deploy rel-web -o jsonpath={.spec.replicas}", "one1"),
	ok("helm upgrade --install other chart --wait --timeout 60s", "^STATUS: deployed"),
	ok("helm uninstall other --keep-history && helm status other", "uninstalled"),
	ok("helm uninstall rel --wait --timeout 60s", `release "rel" uninstalled`),
	ok("k get deploy,svc,cm,thing -o name", "!rel-"),
	bad(1, "helm status rel", "not found"),
	ok("k delete crd things.helm.example.com", "deleted"),
}
