package transcode

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/scheme"
)

// object is what generated code makes of API types.
type object interface {
	Marshal() ([]byte, error)
	Unmarshal([]byte) error
}

// filler fills values at random.
type filler struct{ *rand.Rand }

func (f filler) text() string {
	return []string{"", "a", "nginx:1.25", "line\nbreak", `quote " and \`, "<b>&", "\u00e9\u2028", "bad \xff", "tab\t\x00"}[f.IntN(9)]
}

func (f filler) fill(v reflect.Value, depth int) {
	if f.IntN(3) == 0 || depth > 12 {
		return
	}
	switch p := v.Addr().Interface().(type) {
	case *metav1.Time:
		p.Time = time.Unix(f.Int64N(4e9), 0)
		return
	case *metav1.MicroTime:
		p.Time = time.UnixMicro(f.Int64N(4e15))
		return
	case *metav1.Duration:
		p.Duration = time.Duration(f.Int64N(1e15))
		return
	case *resource.Quantity:
		*p = resource.MustParse([]string{"0", "10m", "1", "16Mi", "1500m", "3e6", "-2", "1.5Gi"}[f.IntN(8)])
		return
	case *metav1.FieldsV1:
		p.SetRawBytes([]byte([]string{`{}`, `{"f:metadata":{"f:labels":{".":{},"f:a":{}}}}`, `{"k:{\"a b\":1}":{}}`, `{"f:<&>":{}}`, `{ "f:a" : {} }`}[f.IntN(5)]))
		return
	case *intstr.IntOrString:
		*p = []intstr.IntOrString{intstr.FromInt32(f.Int32()), intstr.FromString(f.text())}[f.IntN(2)]
		return
	case *runtime.RawExtension:
		p.Raw = []byte(`{"a": [1, 2]}`)
		return
	case *metav1.TypeMeta:
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(f.text())
	case reflect.Bool:
		v.SetBool(f.IntN(2) == 0)
	case reflect.Int32, reflect.Int64:
		v.SetInt([]int64{0, 1, -1, 80, int64(f.Int32())}[f.IntN(5)])
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		f.fill(v.Elem(), depth+1)
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			v.SetBytes([]byte(f.text()))
			return
		}
		n := f.IntN(3)
		v.Set(reflect.MakeSlice(v.Type(), n, n))
		for i := range n {
			f.fill(v.Index(i), depth+1)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range f.IntN(4) {
			key, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			f.fill(key, depth+1)
			f.fill(e, depth+1)
			v.SetMapIndex(key, e)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				f.fill(v.Field(i), depth+1)
			}
		}
	}
}

// must are the types whose plans others rely on.
var must = []any{corev1.Pod{}, corev1.Node{}, corev1.ConfigMap{}, corev1.Secret{}, corev1.ServiceAccount{}, appsv1.ReplicaSet{}, coordinationv1.Lease{}, discoveryv1.EndpointSlice{}}

// What is made of any object of any kind is what encoding/json makes of it when it has been through protobuf.
func TestIsEncodingJSON(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	f := filler{rand.New(rand.NewPCG(seed, 1))}
	t.Logf("seed %d", seed)
	var plans Planner
	for _, o := range must {
		if _, err := plans.Plan(reflect.TypeOf(o)); err != nil {
			t.Fatal(err)
		}
	}
	planned := 0
	for k, typ := range scheme.Scheme.AllKnownTypes() {
		if _, ok := reflect.New(typ).Interface().(object); !ok {
			continue
		}
		p, err := plans.Plan(typ)
		if err != nil {
			continue // it can be read in another way
		}
		planned++
		for range 20 {
			o := reflect.New(typ)
			f.fill(o.Elem(), 0)
			wire, err := o.Interface().(object).Marshal()
			if err != nil {
				t.Fatal(k, err)
			}
			if err := check(p, typ, wire); err != nil {
				t.Fatalf("%s: %v", k, err)
			}
		}
	}
	if planned < 100 {
		t.Errorf("only %d types have plans", planned)
	}
}

func check(p *Plan, typ reflect.Type, wire []byte) error {
	back := reflect.New(typ).Interface().(object)
	if err := back.Unmarshal(wire); err != nil {
		return err
	}
	want, err := json.Marshal(back)
	if err != nil {
		return err
	}
	got, err := p.Append(nil, wire, nil)
	if err != nil {
		return fmt.Errorf("%w of %s", err, want)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("\n%s, want\n%s", got, want)
	}
	if _, err := p.Shape(seed, wire); err != nil {
		return err
	}
	return nil
}

var seed = maphash.MakeSeed()

func examplePod() *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p-00001", Namespace: "bench", UID: "8e1d3f0e-1111-2222-3333-444455556666", Generation: 1,
		CreationTimestamp: metav1.Unix(1.7e9, 0), Labels: map[string]string{"app": "web", "tier": "front"},
		ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "bench", Operation: "Update", APIVersion: "v1", Time: &metav1.Time{Time: time.Unix(1.7e9, 0)}, FieldsType: "FieldsV1",
			FieldsV1: metav1.NewFieldsV1(`{"f:metadata":{"f:labels":{".":{},"f:app":{},"f:tier":{}}},"f:spec":{"f:containers":{"k:{\"name\":\"nginx\"}":{".":{},"f:env":{".":{},"k:{\"name\":\"A\"}":{".":{},"f:name":{},"f:value":{}}}}}}}`)}}},
		Spec: corev1.PodSpec{SchedulerName: "bench", RestartPolicy: corev1.RestartPolicyAlways, DNSPolicy: corev1.DNSClusterFirst, ServiceAccountName: "default",
			Containers: []corev1.Container{{Name: "nginx", Image: "nginx:1.25", ImagePullPolicy: corev1.PullIfNotPresent, Ports: []corev1.ContainerPort{{ContainerPort: 80, Protocol: "TCP"}},
				Env:          []corev1.EnvVar{{Name: "A", Value: "1"}, {Name: "B", Value: "two"}},
				VolumeMounts: []corev1.VolumeMount{{Name: "kube-api-access-x", ReadOnly: true, MountPath: "/var/run/secrets/kubernetes.io/serviceaccount"}},
				Resources:    corev1.ResourceRequirements{Requests: corev1.ResourceList{"cpu": resource.MustParse("10m"), "memory": resource.MustParse("16Mi")}}}}},
		Status: corev1.PodStatus{Phase: corev1.PodPending, QOSClass: corev1.PodQOSBurstable}}
}

// Objects that differ in values have one shape; those that differ in what is there have not.
func TestShape(t *testing.T) {
	var plans Planner
	p, err := plans.Plan(reflect.TypeFor[corev1.Pod]())
	if err != nil {
		t.Fatal(err)
	}
	shape := func(change func(*corev1.Pod)) uint64 {
		o := examplePod()
		change(o)
		wire, err := o.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		s, err := p.Shape(seed, wire)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	same := shape(func(*corev1.Pod) {})
	for name, change := range map[string]func(*corev1.Pod){
		"name": func(p *corev1.Pod) { p.Name = "other" }, "label": func(p *corev1.Pod) { p.Labels["app"] = "db" }, "time": func(p *corev1.Pod) { p.CreationTimestamp = metav1.Unix(1, 0) },
		"quantity": func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources.Requests["cpu"] = resource.MustParse("7")
		},
		"another like it": func(p *corev1.Pod) {
			p.Spec.Containers[0].Env = append(p.Spec.Containers[0].Env, corev1.EnvVar{Name: "C", Value: "3"})
		},
	} {
		if shape(change) != same {
			t.Errorf("%s: another shape", name)
		}
	}
	for name, change := range map[string]func(*corev1.Pod){
		"no policy": func(p *corev1.Pod) { p.Spec.RestartPolicy = "" }, "key": func(p *corev1.Pod) { p.Labels["b"] = "db" }, "no time": func(p *corev1.Pod) { p.CreationTimestamp = metav1.Time{} },
		"nested":  func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].Protocol = "" },
		"boolean": func(p *corev1.Pod) { p.Spec.HostNetwork = true },
		"pointer": func(p *corev1.Pod) { p.Spec.EnableServiceLinks = new(bool) },
		"another": func(p *corev1.Pod) { p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "x"}) },
		"quantity": func(p *corev1.Pod) {
			delete(p.Spec.Containers[0].Resources.Requests, "cpu")
		},
	} {
		if shape(change) == same {
			t.Errorf("%s: the same shape", name)
		}
	}
}

// Whatever is stored, it is refused or becomes what encoding/json makes of it, if it is what generated code would write.
func FuzzAppend(f *testing.F) {
	wire, err := examplePod().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	var plans Planner
	p, err := plans.Plan(reflect.TypeFor[corev1.Pod]())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		got, err := p.Append(nil, wire, nil)
		if _, shapeErr := p.Shape(seed, wire); err == nil && shapeErr != nil {
			t.Fatalf("no shape: %v", shapeErr)
		}
		o := &corev1.Pod{}
		if err != nil || o.Unmarshal(wire) != nil {
			return
		}
		if again, err := o.Marshal(); err != nil || !bytes.Equal(again, wire) {
			return
		}
		if want, err := json.Marshal(o); err == nil && !bytes.Equal(got, want) {
			t.Fatalf("\n%s, want\n%s", got, want)
		}
	})
}

func BenchmarkPod(b *testing.B) {
	wire, err := examplePod().Marshal()
	if err != nil {
		b.Fatal(err)
	}
	var plans Planner
	p, err := plans.Plan(reflect.TypeFor[corev1.Pod]())
	if err != nil {
		b.Fatal(err)
	}
	b.Run("transcoded", func(b *testing.B) {
		b.ReportAllocs()
		var dst []byte
		for range b.N {
			dst, _ = p.Append(dst[:0], wire, nil)
		}
	})
	b.Run("shape", func(b *testing.B) {
		b.ReportAllocs()
		for range b.N {
			_, _ = p.Shape(seed, wire)
		}
	})
	b.Run("decoded and encoded", func(b *testing.B) {
		b.ReportAllocs()
		for range b.N {
			o := &corev1.Pod{}
			_ = o.Unmarshal(wire)
			_, _ = json.Marshal(o)
		}
	})
}
