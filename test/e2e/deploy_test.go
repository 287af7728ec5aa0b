package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// webYAML is a Deployment, a Service with a fixed node port and a headless one.
const webYAML = `apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 6
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: skein.local/web:1
        imagePullPolicy: IfNotPresent
        ports: [{containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
        env:
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: RELEASE, value: "1"}
        resources: {requests: {cpu: 10m, memory: 16Mi}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIP: 10.96.7.7
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
---
apiVersion: v1
kind: Service
metadata: {name: web-pods}
spec:
  clusterIP: None
  selector: {app: web}
  ports: [{port: 8080}]
`

const webURL = "http://10.96.7.7/"

// deploy shows a Deployment behind a Service from everywhere.
func (w *world) deploy(t *testing.T) {
	w.do(t, "n1", "delete", "deployment/web", "service/web", "service/web-pods", "--cascade=foreground")
	w.apply(t, "n4", webYAML) // through a node without a replica
	pods, took := w.awaitPods(t, "n5", "app=web", 6, 60*time.Second)
	t.Logf("6 pods Ready after %s", took)
	on := map[string]int{}
	for _, p := range pods {
		on[p.Spec.NodeName]++
	}
	if len(on) < 5 {
		t.Errorf("6 equal pods on 5 equal nodes should spread over all: %v", on)
	}
	for _, n := range w.others() {
		eventually(t, 10*time.Second, "the ClusterIP answers on "+n, func() error {
			_, err := w.fetch(n, webURL)
			return err
		})
	}
	seen := map[string]bool{}
	p := w.probe(t, "n1", webURL, 10*time.Millisecond)
	eventually(t, 20*time.Second, "all pods answer through the ClusterIP", func() error {
		for _, s := range p.all() {
			seen[field(s.Body, "pod")] = true
		}
		if len(seen) < 6 {
			return fmt.Errorf("only %v", seen)
		}
		return nil
	})
	if bad := failed(p.stop()); len(bad) > 0 {
		t.Errorf("%d requests failed: %+v", len(bad), bad[0])
	}
}

// field takes one out of the web program's answer.
func field(body, name string) string {
	_, rest, ok := strings.Cut(" "+body, " "+name+"=")
	if !ok {
		return ""
	}
	v, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	return v
}
