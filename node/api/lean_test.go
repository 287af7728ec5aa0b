package api

import (
	"reflect"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// What costs much memory stays out of the process: informers of kinds that there are many of, and go-restful's routes for every kind.
func TestServerStaysLean(t *testing.T) {
	admin(t)
	b := cluster.servers[0].build
	done := make(chan struct{})
	close(done) // tells what has been started, and does not wait
	for kind := range b.informers.WaitForCacheSync(done) {
		for _, many := range []any{&corev1.Pod{}, &corev1.Secret{}, &corev1.ConfigMap{}, &corev1.Event{}} {
			if kind == reflect.TypeOf(many) {
				t.Errorf("the server has an informer of all %s", kind)
			}
		}
	}
	if len(b.informers.WaitForCacheSync(done)) == 0 {
		t.Error("this test does not see the informers")
	}
	routes := 0
	for _, ws := range cluster.servers[0].chain.outer.GenericAPIServer.Handler.GoRestfulContainer.RegisteredWebServices() {
		routes += len(ws.Routes())
	}
	if routes > 30 {
		t.Errorf("%d routes of go-restful", routes)
	}
	if paths := cluster.servers[0].chain.outer.GenericAPIServer.ListedPaths(); !slices.Contains(paths, "/version") {
		t.Errorf("this test does not see the paths: %v", paths)
	}
}
