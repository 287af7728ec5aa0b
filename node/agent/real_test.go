package agent_test

import (
	"encoding/pem"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func pemCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// TestReal runs pods in real containers against a real API.
func TestReal(t *testing.T) {
	c := newRealCluster(t)
	began := time.Now()
	c.run(appPod("web"))
	p := c.wait("web", "Ready", ready)
	t.Logf("web is Ready after %v: %s", time.Since(began).Round(time.Millisecond), statusText(p))
	ev, err := c.admin.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range ev.Items {
		t.Logf("event %s %s %s %s", e.Type, e.Reason, e.InvolvedObject.FieldPath, e.Message)
	}
	began = time.Now()
	c.delete("web", 2)
	c.gone("web")
	t.Logf("web is gone after %v", time.Since(began).Round(time.Millisecond))
	n, err := c.admin.CoreV1().Nodes().Get(t.Context(), "n1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("node %v %v", n.Labels, n.Status)
	_ = corev1.PodRunning
}
