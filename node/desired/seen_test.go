package desired

import (
	"path/filepath"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

// The copy is followed while watches are open, and the time when it was last true outlives the process.
func TestSeen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "desired.db")
	s := mustOpen(t, path)
	if s.Watched() || !s.Seen().IsZero() {
		t.Error("followed before it ran")
	}
	stop := run(t, s, fake.NewClientset(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", ResourceVersion: "1"}}))
	deadline := time.Now().Add(10 * time.Second)
	for !s.Watched() {
		if time.Now().After(deadline) {
			t.Fatal("never followed")
		}
		time.Sleep(time.Millisecond)
	}
	at := time.UnixMilli(1234567890123)
	s.Saw(at)
	stop()
	if s.Watched() {
		t.Error("followed after the end")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, path)
	if !s.Seen().IsZero() {
		t.Error("seen before it is known whose file it is")
	}
	stop = run(t, s, fake.NewClientset())
	for s.Seen().IsZero() && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	stop()
	if !s.Seen().Equal(at) {
		t.Errorf("seen at %s, want %s", s.Seen(), at)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
