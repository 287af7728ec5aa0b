package scheduler

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	metadatafake "k8s.io/client-go/metadata/fake"
	"k8s.io/client-go/tools/record"
)

// All controllers and placement together, on a fake API: a Deployment spreads
// over three nodes, one dies, and its pod is replaced on another after the
// grace that its pods tolerate.
func TestDeploymentSurvivesTheLossOfANode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		health := newHealth()
		var objs []runtime.Object
		for _, name := range []string{"a", "b", "c"} {
			objs = append(objs, testNode(name, "4", func(n *v1.Node) { n.ResourceVersion = "1" }))
			health.set(name, NodeHealth{State: Alive})
		}
		client := newClient(nil, append(objs, &v1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}})...)
		scheme := metadatafake.NewTestScheme()
		if err := metav1.AddMetaToScheme(scheme); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- Run(ctx, Config{
				Client: client, Metadata: metadatafake.NewSimpleMetadataClient(scheme), Health: health,
				PodCIDR: prefix("10.244.0.0/16"), RootCA: []byte("CA"), Seed: 1,
				Recorder: func(string) record.EventRecorder { return record.NewFakeRecorder(100000) },
			})
		}()
		settle(time.Second)
		replicas, grace := int32(6), int64(10)
		web := map[string]string{"app": "web"}
		_, err := client.AppsV1().Deployments("default").Create(ctx, &appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: "web"},
			Spec: appsv1.DeploymentSpec{Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: web}, Template: v1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: web},
				Spec: v1.PodSpec{SchedulerName: v1.DefaultSchedulerName, Containers: []v1.Container{{Name: "c", Image: "web"}},
					Tolerations: []v1.Toleration{{Key: v1.TaintNodeUnreachable, Operator: v1.TolerationOpExists, Effect: v1.TaintEffectNoExecute, TolerationSeconds: &grace}}},
			}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		perNode := func() string {
			list, err := client.CoreV1().Pods("default").List(ctx, metav1.ListOptions{LabelSelector: labels.Set(web).String()})
			if err != nil {
				t.Fatal(err)
			}
			n := map[string]int{}
			for _, p := range list.Items {
				n[p.Spec.NodeName]++
			}
			return fmt.Sprint(n)
		}
		settle(5 * time.Second)
		if got := perNode(); got != "map[a:2 b:2 c:2]" {
			t.Fatalf("six replicas on three nodes: %s", got)
		}
		health.set("b", NodeHealth{State: Dead, Since: time.Now()})
		settle(9 * time.Second)
		if got := perNode(); got != "map[a:2 b:2 c:2]" {
			t.Errorf("within the grace: %s", got)
		}
		settle(2 * time.Second)
		if got := perNode(); got != "map[a:3 c:3]" {
			t.Errorf("after the grace: %s", got)
			for _, a := range client.Actions() {
				if a.GetResource().Resource == "pods" && a.GetVerb() != "list" && a.GetVerb() != "watch" {
					t.Logf("%+v", a)
				}
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}
