package simulate

import (
	"fmt"
	"reflect"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// The objects that the simulated users make, as the API's defaulting leaves them.

func ptr[T any](v T) *T { return &v }

func reflectPtr(v int32) reflect.Value { return reflect.ValueOf(&v) }

func podSpec(cpu string, restart corev1.RestartPolicy) corev1.PodSpec {
	return corev1.PodSpec{
		RestartPolicy: restart, SchedulerName: corev1.DefaultSchedulerName, TerminationGracePeriodSeconds: ptr(int64(30)), DNSPolicy: corev1.DNSClusterFirst,
		SecurityContext: &corev1.PodSecurityContext{},
		Containers: []corev1.Container{{Name: "c", Image: "web:1", Resources: corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse("64Mi")}}}},
	}
}

func template(app, cpu string, restart corev1.RestartPolicy) corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": app}}, Spec: podSpec(cpu, restart)}
}

func selector(app string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
}

func deployment(ns, name string, replicas int32, unavailable, surge intstr.IntOrString, recreate bool) *appsv1.Deployment {
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{"app": name}}, Spec: appsv1.DeploymentSpec{
		Replicas: &replicas, Selector: selector(name), Template: template(name, "100m", corev1.RestartPolicyAlways),
		RevisionHistoryLimit: ptr(int32(3)), ProgressDeadlineSeconds: ptr(int32(600)),
		Strategy: appsv1.DeploymentStrategy{Type: appsv1.RollingUpdateDeploymentStrategyType, RollingUpdate: &appsv1.RollingUpdateDeployment{MaxUnavailable: &unavailable, MaxSurge: &surge}},
	}}
	if recreate {
		d.Spec.Strategy = appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType}
	}
	return d
}

func statefulSet(ns, name string, replicas int32, policy appsv1.PodManagementPolicyType) *appsv1.StatefulSet {
	return &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{"app": name}}, Spec: appsv1.StatefulSetSpec{
		Replicas: &replicas, Selector: selector(name), Template: template(name, "100m", corev1.RestartPolicyAlways), ServiceName: name,
		PodManagementPolicy: policy, RevisionHistoryLimit: ptr(int32(3)),
		UpdateStrategy: appsv1.StatefulSetUpdateStrategy{Type: appsv1.RollingUpdateStatefulSetStrategyType, RollingUpdate: &appsv1.RollingUpdateStatefulSetStrategy{Partition: ptr(int32(0))}},
	}}
}

func daemonSet(ns, name string, surge bool) *appsv1.DaemonSet {
	ru := &appsv1.RollingUpdateDaemonSet{MaxUnavailable: ptr(intstr.FromString("20%")), MaxSurge: ptr(intstr.FromInt32(0))}
	if surge {
		ru = &appsv1.RollingUpdateDaemonSet{MaxUnavailable: ptr(intstr.FromInt32(0)), MaxSurge: ptr(intstr.FromString("20%"))}
	}
	return &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{"app": name}}, Spec: appsv1.DaemonSetSpec{
		Selector: selector(name), Template: template(name, "50m", corev1.RestartPolicyAlways), RevisionHistoryLimit: ptr(int32(3)),
		UpdateStrategy: appsv1.DaemonSetUpdateStrategy{Type: appsv1.RollingUpdateDaemonSetStrategyType, RollingUpdate: ru},
	}}
}

// job makes a Job of which fails of a hundred pods fail.
func job(ns, name string, completions, parallelism int32, indexed bool, fails int) *batchv1.Job {
	mode := batchv1.NonIndexedCompletion
	if indexed {
		mode = batchv1.IndexedCompletion
	}
	t := template(name, "50m", corev1.RestartPolicyNever)
	t.Annotations = map[string]string{annotationFails: strconv.Itoa(fails)}
	return &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{"app": name}}, Spec: jobSpec(name, completions, parallelism, mode, t)}
}

func jobSpec(name string, completions, parallelism int32, mode batchv1.CompletionMode, t corev1.PodTemplateSpec) batchv1.JobSpec {
	labels := map[string]string{"app": name, "batch.kubernetes.io/job-name": name}
	t.Labels = labels
	return batchv1.JobSpec{
		Completions: &completions, Parallelism: &parallelism, BackoffLimit: ptr(int32(1000)), CompletionMode: &mode, Suspend: ptr(false), ManualSelector: ptr(true),
		PodReplacementPolicy: ptr(batchv1.TerminatingOrFailed), Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"batch.kubernetes.io/job-name": name}}, Template: t,
	}
}

func service(ns, name string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: corev1.ServiceSpec{
		Selector: map[string]string{"app": name}, ClusterIP: corev1.ClusterIPNone, ClusterIPs: []string{corev1.ClusterIPNone}, Type: corev1.ServiceTypeClusterIP,
		IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol}, IPFamilyPolicy: ptr(corev1.IPFamilyPolicySingleStack), SessionAffinity: corev1.ServiceAffinityNone,
		InternalTrafficPolicy: ptr(corev1.ServiceInternalTrafficPolicyCluster),
		Ports:                 []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80, TargetPort: intstr.FromInt32(80)}},
	}}
}

func budget(ns, name string, unavailable intstr.IntOrString) *policyv1.PodDisruptionBudget {
	return &policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: policyv1.PodDisruptionBudgetSpec{
		MaxUnavailable: &unavailable, Selector: selector(name)}}
}

// make creates an object of any kind.
func (w *world) make(obj runtime.Object) {
	if _, err := w.s.create(w.kindOf(obj), obj, "user"); err != nil {
		panic(fmt.Sprintf("make %T: %v", obj, err))
	}
}

func (w *world) kindOf(obj runtime.Object) kind {
	for _, k := range w.s.kinds {
		if reflect.TypeOf(newOf(k)) == reflect.TypeOf(obj) {
			return k
		}
	}
	panic(fmt.Sprintf("no kind for %T", obj))
}

// edit changes an object as a user would; false if there is none.
func edit[T runtime.Object](w *world, ns, name string, fn func(T)) bool {
	var none T
	k := w.kindOf(reflect.New(reflect.TypeOf(none).Elem()).Interface().(runtime.Object))
	_, err := w.s.change(k, key{ns, name}, "", "update", "user", func(o runtime.Object) (runtime.Object, error) {
		fn(o.(T))
		return o, nil
	})
	return err == nil
}

// all returns every object of a kind.
func all[T runtime.Object](w *world) []T {
	var none T
	k := w.kindOf(reflect.New(reflect.TypeOf(none).Elem()).Interface().(runtime.Object))
	entries, _ := w.s.list(k, "")
	out := make([]T, 0, len(entries))
	for _, e := range entries {
		out = append(out, e.obj.(T))
	}
	return out
}
