package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"skein.io/skein/node/client"
)

const whyYAML = `apiVersion: v1
kind: Pod
metadata: {name: greedy, labels: {app: greedy}}
spec:
  containers: [{name: c, image: "skein.local/web:1", imagePullPolicy: IfNotPresent, resources: {requests: {cpu: "900"}}}]
---
apiVersion: v1
kind: Pod
metadata: {name: modest, labels: {app: modest}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: "skein.local/web:1", imagePullPolicy: IfNotPresent}]
`

// Every node says why a pod is where it is, also one that neither leads nor holds a replica.
func (w *world) whyThere(t *testing.T) {
	w.apply(t, "n1", whyYAML)
	defer w.do(t, "n1", "delete", "pod", "greedy", "modest", "--wait=false")
	pods, _ := w.awaitPods(t, "n1", "app=modest", 1, time.Minute)
	for _, node := range []string{"n1", "n2", "n5"} {
		eventually(t, 20*time.Second, "why the greedy pod waits, asked at "+node, func() error {
			out, err := w.cli(node, "why", "greedy")
			if err != nil {
				return err
			}
			for _, want := range []string{"default/greedy is on no node.", "None of 5 nodes can take it.", "Its event says: 0/5 nodes are available: 5 Insufficient cpu.",
				"n3 refuses:\n  NodeResourcesFit: Insufficient cpu\n    cpu: wants 900, ", "would help: a request of at most "} {
				if !strings.Contains(out, want) {
					return fmt.Errorf("nothing of %q in\n%s", want, out)
				}
			}
			return nil
		})
		var answer client.Why
		must(t, json.Unmarshal([]byte(w.do(t, node, "why", "modest", "-o", "json")), &answer))
		if answer.Node != pods[0].Spec.NodeName || answer.Since.IsZero() || len(answer.Nodes) != 5 || len(answer.Summary) == 0 || answer.Nodes[0].Total == 0 {
			t.Errorf("asked at %s: %+v", node, answer)
		}
	}
	refused(t, errOf(w.cli("n2", "why", "nobody")), `pods "nobody" not found`)
}
