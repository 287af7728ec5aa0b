package simulate

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	resourceapi "k8s.io/api/resource/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"skein.io/skein/scheduler"
	"skein.io/skein/scheduler/controller"
)

// busy is a controller that writes although nothing changes.
type busy struct{ controller.Deps }

func (busy) Name() string { return "busy" }

func (b busy) Run(ctx context.Context) error {
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(5 * time.Minute):
			patch := []byte(`{"metadata":{"annotations":{"busy":"` + strings.Repeat("x", n%7) + `"}}}`)
			_, _ = b.Client.CoreV1().Namespaces().Patch(ctx, "default", types.MergePatchType, patch, metav1.PatchOptions{})
		}
	}
}

// deaf is a controller that goes on writing when it is told to stop.
type deaf struct{ controller.Deps }

func (deaf) Name() string { return "deaf" }

func (b deaf) Run(ctx context.Context) error {
	<-ctx.Done()
	time.Sleep(100 * time.Millisecond)
	_, _ = b.Client.CoreV1().Namespaces().Patch(context.WithoutCancel(ctx), "default", types.MergePatchType, []byte(`{"metadata":{"labels":{"deaf":"yes"}}}`), metav1.PatchOptions{})
	return nil
}

// without leaves a controller out.
func without(name string) func(*scheduler.Config) {
	return func(cfg *scheduler.Config) {
		for _, mk := range scheduler.Controllers() {
			cfg.Controllers = append(cfg.Controllers, func(d controller.Deps, c scheduler.Config) controller.Controller {
				if made := mk(d, c); made.Name() != name {
					return made
				}
				return resting(name)
			})
		}
	}
}

type resting string

func (r resting) Name() string { return string(r) }

func (r resting) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// mutant is a rule broken.
type mutant struct {
	name  string
	fault fault
	want  string // in one of the violations
	long  bool   // it takes a whole history to be noticed
	only  string // the trouble that it needs
}

// TestSimulationCanFail breaks one rule at a time, each in one place, and wants it to be noticed as what it is.
func TestSimulationCanFail(t *testing.T) {
	mutants := []mutant{
		{"a rolling update that takes everything at once", fault{misread: func(o runtime.Object) {
			if d, ok := o.(*appsv1.Deployment); ok && d.Spec.Strategy.RollingUpdate != nil {
				d.Spec.Strategy.RollingUpdate.MaxUnavailable = ptr(intstr.FromString("100%"))
			}
		}}, "may be missing", false, ""},
		{"one pod too many", fault{misread: func(o runtime.Object) {
			if rs, ok := o.(*appsv1.ReplicaSet); ok && *rs.Spec.Replicas > 1 {
				*rs.Spec.Replicas++
			}
		}}, "ReplicaSet", false, ""},
		{"StatefulSets out of order", fault{misread: func(o runtime.Object) {
			if s, ok := o.(*appsv1.StatefulSet); ok {
				s.Spec.PodManagementPolicy = appsv1.ParallelPodManagement
			}
		}}, "was made while", false, ""},
		{"nodes thought larger than they are", fault{misread: func(o runtime.Object) {
			if n, ok := o.(*corev1.Node); ok {
				n.Status.Allocatable[corev1.ResourceCPU] = *quantity("100")
			}
		}}, "over capacity", false, ""},
		{"pods of lost nodes deleted by force", fault{miswrite: func(q query, o runtime.Object) {
			if opts, ok := o.(*metav1.DeleteOptions); ok && q.kind.gvr == podsGVR {
				opts.GracePeriodSeconds = ptr(int64(0))
			}
		}}, "two processes of ordinal", true, ""},
		{"more Job pods than asked for", fault{misread: func(o runtime.Object) {
			if j, ok := o.(*batchv1.Job); ok {
				*j.Spec.Parallelism++
			}
		}}, "active pods", false, ""},
		{"a success counted twice", fault{miswrite: func(q query, o runtime.Object) {
			if j, ok := o.(*batchv1.Job); ok && q.sub == "status" && j.Status.Succeeded > 0 {
				j.Status.Succeeded++
			}
		}}, "counts", false, ""},
		{"budgets counted wrong", fault{miswrite: func(q query, o runtime.Object) {
			if b, ok := o.(*policyv1.PodDisruptionBudget); ok {
				b.Status.DisruptionsAllowed += 5
			}
		}}, "budget", true, "drain"},
		{"pods bound where their volumes are not", fault{miswrite: func(q query, o runtime.Object) {
			if b, ok := o.(*corev1.Binding); ok && strings.HasPrefix(q.at.name, "db-") {
				b.Target.Name = "n0000"
			}
		}}, "out of reach", false, ""},
		{"devices thought to be free", fault{misread: func(o runtime.Object) {
			if c, ok := o.(*resourceapi.ResourceClaim); ok {
				c.Status.Allocation = nil
			}
		}}, "was given to claim", false, ""},
		{"autoscalers without a bound", fault{misread: func(o runtime.Object) {
			if h, ok := o.(*autoscalingv2.HorizontalPodAutoscaler); ok {
				h.Spec.MaxReplicas = 100
			}
		}}, "allowed are", true, "load changes"},
		{"autoscalers that follow every load at once", fault{misread: func(o runtime.Object) {
			if h, ok := o.(*autoscalingv2.HorizontalPodAutoscaler); ok {
				rules := func() *autoscalingv2.HPAScalingRules {
					return &autoscalingv2.HPAScalingRules{StabilizationWindowSeconds: ptr(int32(0)), SelectPolicy: ptr(autoscalingv2.MaxChangePolicySelect),
						Policies: []autoscalingv2.HPAScalingPolicy{{Type: autoscalingv2.PercentScalingPolicy, Value: 100, PeriodSeconds: 15}}}
				}
				h.Spec.Behavior = &autoscalingv2.HorizontalPodAutoscalerBehavior{ScaleUp: rules(), ScaleDown: rules()}
			}
		}}, "after it was scaled up", true, "load changes"},
		{"quotas counted wrong", fault{miswrite: func(q query, o runtime.Object) {
			if r, ok := o.(*corev1.ResourceQuota); ok && q.sub == "status" {
				r.Status.Used[corev1.ResourcePods] = *quantity("3")
			}
		}}, "its quota is", false, "rollout"},
		{"a leader that is deaf", fault{config: func(cfg *scheduler.Config) {
			cfg.Controllers = append(scheduler.Controllers(), func(d controller.Deps, _ scheduler.Config) controller.Controller { return deaf{d} })
		}}, "told to stop", false, "leader is deposed"},
		{"no garbage collection", fault{config: without("garbage")}, "is being deleted, with finalizers [foregroundDeletion]", true, ""},
		{"no endpoint slices", fault{config: without("endpointslice")}, "leads to", true, ""},
		{"writes while nothing changes", fault{config: func(cfg *scheduler.Config) {
			cfg.Controllers = append(scheduler.Controllers(), func(d controller.Deps, _ scheduler.Config) controller.Controller { return busy{d} })
		}}, "10 idle minutes", true, ""},
		{"deposed leaders that go on", fault{unfenced: true}, "", true, ""},
	}
	if os.Getenv("SKEIN_LONG") == "" {
		mutants = slices.DeleteFunc(mutants, func(m mutant) bool { return m.long })
	}
	for _, m := range mutants {
		t.Run(m.name, func(t *testing.T) {
			noticed := func(violations []string) bool {
				return slices.ContainsFunc(violations, func(v string) bool { return strings.Contains(v, m.want) })
			}
			for _, seed := range seeds(t, 5) {
				res := play(t, seed, scenario{nodes: 9, pods: 90, chaos: 90 * time.Second, every: time.Second, only: m.only}, m.fault, logs(), noticed)
				for _, v := range res.violations {
					if strings.Contains(v, m.want) {
						t.Logf("noticed with seed %d: %s", seed, v)
						return
					}
				}
				t.Logf("not noticed with seed %d: %s\n%v", seed, res.report, res.violations)
			}
			t.Error("not noticed")
		})
	}
}
