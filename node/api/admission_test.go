package api

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	restclient "k8s.io/client-go/rest"
	"skein.io/skein/node/api/access"
)

// warnings remembers the warnings of a client.
type warnings struct{ seen []string }

func (w *warnings) HandleWarningHeader(_ int, _ string, text string) { w.seen = append(w.seen, text) }

func label(t *testing.T, k kubernetes.Interface, ns, key, value string) {
	t.Helper()
	if _, err := k.CoreV1().Namespaces().Patch(t.Context(), ns, "application/merge-patch+json", fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, key, value), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

func privileged(name string) *corev1.Pod {
	p := simplePod(name)
	p.Spec.HostNetwork = true
	p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Privileged: ptr(true)}
	return p
}

// The labels of a namespace say what pods may be, and who is warned.
func TestPodSecurity(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	cfg, heard := cluster.as(cluster.servers[0], "admin", "system:masters"), &warnings{}
	cfg.WarningHandler = heard
	warned := client(t, cfg)
	ns := namespace(t, k)
	if _, err := k.CoreV1().Pods(ns).Create(ctx, privileged("before"), metav1.CreateOptions{}); err != nil {
		t.Fatalf("without labels anything goes: %v", err)
	}
	label(t, k, ns, "pod-security.kubernetes.io/warn", "restricted")
	eventually(t, func(ctx context.Context) error {
		if _, err := warned.CoreV1().Pods(ns).Create(ctx, simplePod("w"), metav1.CreateOptions{DryRun: []string{"All"}}); err != nil {
			return err
		}
		if all := strings.Join(heard.seen, "\n"); !strings.Contains(all, `would violate PodSecurity "restricted:latest"`) {
			return fmt.Errorf("warnings: %q", all)
		}
		return nil
	})
	heard.seen = nil
	// Whoever makes a rule hears of the pods that break it already.
	if _, err := warned.CoreV1().Namespaces().Patch(ctx, ns, "application/merge-patch+json", []byte(`{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":"baseline"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if all := strings.Join(heard.seen, "\n"); !strings.Contains(all, "existing pods in namespace") || !strings.Contains(all, "before") {
		t.Errorf("warnings of whoever enforces: %q", all)
	}
	eventually(t, func(ctx context.Context) error {
		_, err := k.CoreV1().Pods(ns).Create(ctx, privileged("after"), metav1.CreateOptions{DryRun: []string{"All"}})
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), `violates PodSecurity "baseline:latest"`) {
			return fmt.Errorf("a privileged pod: %v", err)
		}
		return nil
	})
	if _, err := k.CoreV1().Pods(ns).Create(ctx, simplePod("fine"), metav1.CreateOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := k.CoreV1().Namespaces().Patch(ctx, ns, "application/merge-patch+json", []byte(`{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":"nonsense"}}}`), metav1.PatchOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("a level that does not exist: %v", err)
	}
}

// A file changes the settings of plugins, lists which of them run.
func TestAdmissionFiles(t *testing.T) {
	ctx := t.Context()
	path := file(t, "admission.yaml", `
apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
- name: PodSecurity
  configuration:
    apiVersion: pod-security.admission.config.k8s.io/v1
    kind: PodSecurityConfiguration
    defaults: {enforce: baseline, enforce-version: latest}
    exemptions: {usernames: [trusted]}
- name: ResourceQuota
  configuration:
    apiVersion: apiserver.config.k8s.io/v1
    kind: ResourceQuotaConfiguration
    limitedResources:
    - resource: pods
      matchScopes:
      - {scopeName: PriorityClass, operator: In, values: [dear]}
`)
	s := another(t, func(c *Config) {
		c.Access = access.Config{Admission: path, EnablePlugins: []string{"AlwaysPullImages"}, DisablePlugins: []string{"DefaultTolerationSeconds"}}
	})
	k := client(t, cluster.as(s, "admin", "system:masters"))
	ns := namespace(t, k)
	if _, err := k.CoreV1().Pods(ns).Create(ctx, privileged("p"), metav1.CreateOptions{}); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "baseline") {
		t.Errorf("by the file's default: %v", err)
	}
	if _, err := client(t, cluster.as(s, "trusted", "system:masters")).CoreV1().Pods(ns).Create(ctx, privileged("t"), metav1.CreateOptions{}); err != nil {
		t.Errorf("exempt: %v", err)
	}
	p, err := k.CoreV1().Pods(ns).Create(ctx, simplePod("q"), metav1.CreateOptions{})
	if err != nil || p.Spec.Containers[0].ImagePullPolicy != corev1.PullAlways || len(p.Spec.Tolerations) > 0 {
		t.Errorf("a plugin that is on, and one that is off: %+v, %v", p, err)
	}
	if _, err := k.SchedulingV1().PriorityClasses().Create(ctx, &schedulingv1.PriorityClass{ObjectMeta: metav1.ObjectMeta{Name: "dear"}, Value: 10}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	dear := simplePod("dear")
	dear.Spec.PriorityClassName = "dear"
	eventually(t, func(ctx context.Context) error {
		_, err := k.CoreV1().Pods(ns).Create(ctx, dear, metav1.CreateOptions{DryRun: []string{"All"}})
		if err == nil || !strings.Contains(err.Error(), "insufficient quota to match these scopes") {
			return fmt.Errorf("a class that only a quota gives: %v", err)
		}
		return nil
	})
}

// Pods may stay on a lost node for as long as the cluster waits, unless they say otherwise; a LimitRange sets what they leave open.
func TestDefaultsOfPods(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	s := another(t, func(c *Config) { c.EvictionGrace = 17 * time.Second })
	own := simplePod("own")
	own.Spec.Tolerations = []corev1.Toleration{{Key: "node.kubernetes.io/unreachable", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: ptr(int64(3))}}
	for _, pod := range []*corev1.Pod{simplePod("default"), own} {
		p, err := client(t, cluster.as(s, "admin", "system:masters")).CoreV1().Pods(ns).Create(ctx, pod, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]int64{}
		for _, tol := range p.Spec.Tolerations {
			got[tol.Key] = *tol.TolerationSeconds
		}
		want := map[string]int64{"node.kubernetes.io/not-ready": 17, "node.kubernetes.io/unreachable": 17}
		if pod == own {
			want["node.kubernetes.io/unreachable"] = 3
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("pod %s tolerates %v, want %v", pod.Name, got, want)
		}
	}
	if _, err := k.CoreV1().LimitRanges(ns).Create(ctx, &corev1.LimitRange{ObjectMeta: metav1.ObjectMeta{Name: "l"}, Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{{
		Type: corev1.LimitTypeContainer, Default: quantities("cpu", "2"), DefaultRequest: quantities("cpu", "1"), Max: quantities("cpu", "4")}}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		p, err := k.CoreV1().Pods(ns).Create(ctx, simplePod("limited"), metav1.CreateOptions{DryRun: []string{"All"}})
		if err == nil && (p.Spec.Containers[0].Resources.Requests.Cpu().String() != "1" || p.Spec.Containers[0].Resources.Limits.Cpu().String() != "2") {
			err = fmt.Errorf("resources are %+v", p.Spec.Containers[0].Resources)
		}
		return err
	})
	big := simplePod("big")
	big.Spec.Containers[0].Resources.Limits = quantities("cpu", "5")
	if _, err := k.CoreV1().Pods(ns).Create(ctx, big, metav1.CreateOptions{}); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "maximum cpu usage per Container is 4") {
		t.Errorf("above the limit: %v", err)
	}
}

func quantities(pairs ...string) corev1.ResourceList {
	l := corev1.ResourceList{}
	for i := 0; i < len(pairs); i += 2 {
		l[corev1.ResourceName(pairs[i])] = resource.MustParse(pairs[i+1])
	}
	return l
}

// Each scope of a ResourceQuota counts what it is for, in admission and when the usage is counted anew.
func TestQuotaScopes(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	if _, err := k.SchedulingV1().PriorityClasses().Create(ctx, &schedulingv1.PriorityClass{ObjectMeta: metav1.ObjectMeta{Name: "scoped"}, Value: 10}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.StorageV1().VolumeAttributesClasses().Create(ctx, &storagev1.VolumeAttributesClass{ObjectMeta: metav1.ObjectMeta{Name: "fast"}, DriverName: "d", Parameters: map[string]string{"a": "b"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod := func(change func(*corev1.Pod)) func(kubernetes.Interface, string, string) error {
		return func(k kubernetes.Interface, ns, name string) error {
			p := simplePod(name)
			p.Spec.Containers[0].Resources.Requests = quantities("cpu", "1")
			change(p)
			_, err := k.CoreV1().Pods(ns).Create(ctx, p, metav1.CreateOptions{})
			return err
		}
	}
	claim := func(class *string) func(kubernetes.Interface, string, string) error {
		return func(k kubernetes.Interface, ns, name string) error {
			_, err := k.CoreV1().PersistentVolumeClaims(ns).Create(ctx, &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeClaimSpec{
				AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, VolumeAttributesClassName: class,
				Resources: corev1.VolumeResourceRequirements{Requests: quantities("storage", "1Gi")}}}, metav1.CreateOptions{})
			return err
		}
	}
	plain, best := pod(func(*corev1.Pod) {}), pod(func(p *corev1.Pod) { p.Spec.Containers[0].Resources = corev1.ResourceRequirements{} })
	ending := pod(func(p *corev1.Pod) { p.Spec.ActiveDeadlineSeconds = ptr(int64(10)) })
	dear := pod(func(p *corev1.Pod) { p.Spec.PriorityClassName = "scoped" })
	far := pod(func(p *corev1.Pod) {
		p.Spec.Affinity = &corev1.Affinity{PodAffinity: &corev1.PodAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{
			TopologyKey: "x", Namespaces: []string{"other"}, LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}}}}}
	})
	selected := func(scope corev1.ResourceQuotaScope, op corev1.ScopeSelectorOperator, values ...string) *corev1.ScopeSelector {
		return &corev1.ScopeSelector{MatchExpressions: []corev1.ScopedResourceSelectorRequirement{{ScopeName: scope, Operator: op, Values: values}}}
	}
	for name, c := range map[string]struct {
		scopes        []corev1.ResourceQuotaScope
		selector      *corev1.ScopeSelector
		hard          corev1.ResourceList
		counts, other func(kubernetes.Interface, string, string) error
	}{
		"no-scope":        {nil, nil, quantities("pods", "1", "requests.cpu", "10"), plain, func(k kubernetes.Interface, ns, name string) error { return claim(nil)(k, ns, name) }},
		"besteffort":      {[]corev1.ResourceQuotaScope{corev1.ResourceQuotaScopeBestEffort}, nil, quantities("pods", "1"), best, plain},
		"not-besteffort":  {[]corev1.ResourceQuotaScope{corev1.ResourceQuotaScopeNotBestEffort}, nil, quantities("pods", "1"), plain, best},
		"terminating":     {[]corev1.ResourceQuotaScope{corev1.ResourceQuotaScopeTerminating}, nil, quantities("pods", "1"), ending, plain},
		"not-terminating": {[]corev1.ResourceQuotaScope{corev1.ResourceQuotaScopeNotTerminating}, nil, quantities("pods", "1"), plain, ending},
		"priority":        {nil, selected(corev1.ResourceQuotaScopePriorityClass, corev1.ScopeSelectorOpIn, "scoped"), quantities("pods", "1"), dear, plain},
		"any-priority":    {nil, selected(corev1.ResourceQuotaScopePriorityClass, corev1.ScopeSelectorOpExists), quantities("pods", "1"), dear, plain},
		"far-affinity":    {nil, selected(corev1.ResourceQuotaScopeCrossNamespacePodAffinity, corev1.ScopeSelectorOpExists), quantities("pods", "1"), far, plain},
		"volume-class":    {nil, selected(corev1.ResourceQuotaScopeVolumeAttributesClass, corev1.ScopeSelectorOpIn, "fast"), quantities("persistentvolumeclaims", "1"), claim(ptr("fast")), claim(nil)},
		"counted":         {nil, nil, quantities("count/persistentvolumeclaims", "1"), claim(nil), plain},
	} {
		t.Run(name, func(t *testing.T) {
			ns := namespace(t, k)
			q, err := k.CoreV1().ResourceQuotas(ns).Create(ctx, &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: "q"}, Spec: corev1.ResourceQuotaSpec{Hard: c.hard, Scopes: c.scopes, ScopeSelector: c.selector}}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			count := func(ctx context.Context) (corev1.ResourceList, error) { return usage(ctx, t, k, q) }
			q.Status.Hard = c.hard // as the controller does
			if q.Status.Used, err = count(ctx); err != nil {
				t.Fatal(err)
			}
			if _, err := k.CoreV1().ResourceQuotas(ns).UpdateStatus(ctx, q, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			eventually(t, func(ctx context.Context) error { // admission has to hear of the limits
				if err := c.counts(k, ns, "first"); err != nil && !apierrors.IsAlreadyExists(err) && !strings.Contains(err.Error(), "exceeded quota: q") {
					return err
				}
				got, err := k.CoreV1().ResourceQuotas(ns).Get(ctx, "q", metav1.GetOptions{})
				if err != nil {
					return err
				}
				for what := range c.hard {
					if used := got.Status.Used[what]; used.IsZero() && what != "requests.cpu" {
						if err := c.counts(k, ns, "again"); err != nil && !apierrors.IsForbidden(err) {
							return err
						}
						return fmt.Errorf("used %v", got.Status.Used)
					}
				}
				return nil
			})
			if err := c.counts(k, ns, "second"); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "exceeded quota: q") {
				t.Errorf("one too many: %v", err)
			}
			if err := c.other(k, ns, "other"); err != nil {
				t.Errorf("what is not counted: %v", err)
			}
			// Counted anew it is the same, or what was there before the limits as well.
			used, err := count(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for what := range c.hard {
				if n := used[what]; n.IsZero() {
					t.Errorf("counted anew: %v", used)
				}
			}
		})
	}
}

// usage counts as the controller does.
func usage(ctx context.Context, t *testing.T, k kubernetes.Interface, q *corev1.ResourceQuota) (corev1.ResourceList, error) {
	t.Helper()
	m, err := metadata.NewForConfig(cluster.as(cluster.servers[0], "admin", "system:masters"))
	if err != nil {
		t.Fatal(err)
	}
	f := informers.NewSharedInformerFactoryWithOptions(k, 0, informers.WithNamespace(q.Namespace))
	u := NewQuotaUsage(f, k, m)
	ctx, cancel := context.WithCancel(ctx)
	defer f.Shutdown()
	defer cancel()
	f.StartWithContext(ctx)
	f.WaitForCacheSync(ctx.Done())
	used, _, err := u.Usage(ctx, q)
	return used, err
}

var _ restclient.WarningHandler = (*warnings)(nil)
