package simulate

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
)

// homeBounded is a namespace with a quota of pods that its workloads hardly keep to.
const homeBounded = "bounded"

var quotasGVR = schema.GroupVersionResource{Version: "v1", Resource: "resourcequotas"}

// addBounded makes the namespace: Deployments that fit, with two pods more for their roll-outs and for Jobs.
func (u *user) addBounded() int {
	u.w.namespace(homeBounded)
	hard := corev1.ResourceList{corev1.ResourcePods: resource.MustParse("12")}
	u.w.make(&corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: homeBounded, Name: "pods"}, Spec: corev1.ResourceQuotaSpec{Hard: hard}})
	u.w.make(deployment(homeBounded, "many", 6, k25, k25, false))
	u.w.make(deployment(homeBounded, "surging", 4, kNone, kOne, false))
	for _, name := range []string{"many", "surging"} {
		edit(u.w, homeBounded, name, u.keep)
	}
	u.boundedJob()
	return 12
}

// boundedJob makes a Job that has to share what is left.
func (u *user) boundedJob() {
	j := job(homeBounded, u.name("job"), 4, 3, false, 10)
	j.Spec.TTLSecondsAfterFinished = ptr(int32(20))
	u.w.make(j)
}

// counts says that a pod counts towards a quota (upstream's QuotaV1Pod).
func counts(p *corev1.Pod) bool {
	if podEnded(p) {
		return false
	}
	grace := p.DeletionGracePeriodSeconds
	return p.DeletionTimestamp == nil || grace == nil || !time.Now().After(p.DeletionTimestamp.Add(time.Duration(*grace)*time.Second))
}

// charge is the admission of quotas: it counts a new pod, or refuses it. The lock is held.
func (s *store) charge(pod *corev1.Pod, who string) error {
	t := s.tables[quotasGVR]
	for at, e := range t.objs {
		if at.ns != pod.Namespace {
			continue
		}
		q := e.obj.(*corev1.ResourceQuota)
		if !equality.Semantic.DeepEqual(q.Spec.Hard, q.Status.Hard) {
			return apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, pod.Name, fmt.Errorf("status unknown for quota: %s", at.name))
		}
		used := q.Status.Used.Pods().Value()
		if hard := q.Spec.Hard.Pods().Value(); used+1 > hard {
			return apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, pod.Name, fmt.Errorf("exceeded quota: %s, requested: pods=1, used: pods=%d, limited: pods=%d", at.name, used, hard))
		}
		q = q.DeepCopy()
		q.Status.Used[corev1.ResourcePods] = *resource.NewQuantity(used+1, resource.DecimalSI)
		s.put(t, watch.Modified, q, who+"/admission")
	}
	return nil
}

// podUsage counts the pods of a quota in the shared view.
type podUsage struct{ pods corelisters.PodLister }

func newUsage(f informers.SharedInformerFactory) podUsage {
	return podUsage{f.Core().V1().Pods().Lister()}
}

func (u podUsage) Usage(_ context.Context, q *corev1.ResourceQuota) (corev1.ResourceList, bool, error) {
	pods, err := u.pods.Pods(q.Namespace).List(labels.Everything())
	if err != nil {
		return nil, false, err
	}
	n := int64(0)
	for _, p := range pods {
		if counts(p) {
			n++
		}
	}
	return corev1.ResourceList{corev1.ResourcePods: *resource.NewQuantity(n, resource.DecimalSI)}, false, nil
}

// withinQuota checks the namespace of a pod that was made this moment.
func (v *invariants) withinQuota(pod *corev1.Pod) {
	for at, e := range v.s.tables[quotasGVR].objs {
		if at.ns != pod.Namespace {
			continue
		}
		v.checks["quota: never exceeded"]++
		n := int64(0)
		for pk, pe := range v.s.tables[podsGVR].objs {
			if pk.ns == at.ns && counts(pe.obj.(*corev1.Pod)) {
				n++
			}
		}
		if hard := e.obj.(*corev1.ResourceQuota).Spec.Hard.Pods().Value(); n > hard {
			v.broken("namespace %s has %d pods with %s, its quota is %d", at.ns, n, pod.Name, hard)
		}
	}
}

// quotasDone: what is used is what is there.
func (w *world) quotasDone(add complain) {
	for _, q := range all[*corev1.ResourceQuota](w) {
		n := int64(0)
		for _, p := range all[*corev1.Pod](w) {
			if p.Namespace == q.Namespace && counts(p) {
				n++
			}
		}
		if used := q.Status.Used.Pods().Value(); used != n {
			add("quota %s/%s counts %d pods, there are %d", q.Namespace, q.Name, used, n)
		}
	}
}
