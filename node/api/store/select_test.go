package store

import (
	"fmt"
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/kubernetes/pkg/apis/core"
	registrypod "k8s.io/kubernetes/pkg/registry/core/pod"

	"skein.io/skein/node/api/store/rawlist"
)

// What is selected by the stored bytes of a pod is what upstream selects by the object.
func TestSelectIsUpstreams(t *testing.T) {
	fill, rnd := randomPods(t)
	codec := podCodec()
	names := []string{"metadata.name", "metadata.namespace", "spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName", "spec.hostNetwork",
		"status.phase", "status.podIP", "status.nominatedNodeName"}
	seen := map[string]int{}
	for range 3000 {
		pod := somePod(fill, rnd)
		if rnd.Intn(2) == 0 { // as the API leaves none empty
			pod.Spec.SchedulerName, pod.Spec.ServiceAccountName, pod.Status.Phase = "default-scheduler", "default", core.PodPending
		}
		stored, err := runtime.Encode(codec, pod)
		if err != nil {
			t.Fatal(err)
		}
		o, err := runtime.Decode(codec, stored)
		if err != nil {
			t.Fatal(err)
		}
		_, attrs, err := registrypod.GetAttrs(o)
		if err != nil {
			t.Fatal(err)
		}
		for range 10 {
			l, f := "", ""
			if rnd.Intn(2) == 0 {
				l = []string{"a", "!a", "a=before", "a!=before", "zz in (before,after),a", "a=other", "zz notin (other)"}[rnd.Intn(7)]
			}
			name := names[rnd.Intn(len(names))]
			if rnd.Intn(3) > 0 {
				f = name + []string{"=", "!="}[rnd.Intn(2)] + fields.EscapeValue([]string{"", attrs[name], "other"}[rnd.Intn(3)])
			}
			label, err := labels.Parse(l)
			if err != nil {
				t.Fatal(err)
			}
			p := registrypod.MatchPod(label, fields.ParseSelectorOrDie(f))
			want, err := p.Matches(o)
			if err != nil {
				t.Fatal(err)
			}
			got, ok := rawlist.PodSelected(stored, &p)
			if ok && got != want {
				t.Fatalf("labels %q, fields %q: %v, upstream %v: %+v", l, f, got, want, o)
			}
			seen[fmt.Sprint(ok, got)]++
			if !ok && f == "" || !ok && slices.Contains(names[:3], name) || ok && f != "" && (name == "spec.hostNetwork" || name == "status.podIP") && got {
				t.Fatalf("labels %q, fields %q: %v, %v", l, f, got, ok)
			}
		}
	}
	for _, what := range []string{"true true", "true false", "false false"} {
		if seen[what] < 100 {
			t.Errorf("seen too seldom: %v", seen)
		}
	}
}
