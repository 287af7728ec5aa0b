package api

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/consensus/shard"
)

// Every kind that is served lies whole in one shard, since a list or a watch is of one store; the kinds that are written most
// in shards of their own.
func TestKindsInShards(t *testing.T) {
	other := map[string]string{"/registry/pods/": "pods", "/registry/events/": "events", "/registry/leases/": "events"}
	seen := 0
	cluster.prefixes.Range(func(k, _ any) bool {
		prefix := k.(string)
		seen++
		s, err := shard.Default().ForRange(prefix, clientv3.GetPrefixRangeEnd(prefix))
		if err != nil {
			t.Errorf("%s: %v", prefix, err)
		}
		want, ok := other[prefix]
		if !ok {
			want = "system"
		}
		if s.Name != want {
			t.Errorf("%s is in shard %q, want %q", prefix, s.Name, want)
		}
		delete(other, prefix)
		return true
	})
	if seen < 55 || len(other) > 0 {
		t.Errorf("%d kinds asked for a store, not for %v", seen, other)
	}
}

// A list that was begun before the past of its revision was compacted cannot be continued: 410, with a token to go on without
// consistency, as upstream.
func TestContinueAfterCompaction(t *testing.T) {
	ctx := context.Background()
	k := admin(t)
	ns := namespace(t, k)
	for i := range 4 {
		if _, err := k.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("c", i)}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	first, err := k.CoreV1().ConfigMaps(ns).List(ctx, metav1.ListOptions{Limit: 2})
	if err != nil || len(first.Items) != 2 || first.Continue == "" {
		t.Fatalf("%v, %+v", err, first)
	}
	if err := k.CoreV1().ConfigMaps(ns).Delete(ctx, "c3", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r, err := cluster.store.KV.Put(ctx, "/compacted", "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cluster.store.Compact(ctx, r.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	_, err = k.CoreV1().ConfigMaps(ns).List(ctx, metav1.ListOptions{Limit: 2, Continue: first.Continue})
	status, ok := err.(apierrors.APIStatus)
	if !ok || status.Status().Code != http.StatusGone || status.Status().Reason != metav1.StatusReasonExpired {
		t.Fatalf("a continued list: %v", err)
	}
	rest := status.Status().ListMeta.Continue
	if rest == "" || !strings.Contains(err.Error(), "inconsistent list") {
		t.Errorf("no token to go on with: %v", err)
	}
	more, err := k.CoreV1().ConfigMaps(ns).List(ctx, metav1.ListOptions{Limit: 5, Continue: rest})
	if err != nil || len(more.Items) != 1 || more.Items[0].Name != "c2" {
		t.Errorf("the rest is %v, %v", more, err)
	}
	old := fmt.Sprint(1)
	if _, err := k.CoreV1().ConfigMaps(ns).List(ctx, metav1.ListOptions{ResourceVersion: old, ResourceVersionMatch: metav1.ResourceVersionMatchExact}); !apierrors.IsResourceExpired(err) {
		t.Errorf("a list of a compacted revision: %v", err)
	}
}
