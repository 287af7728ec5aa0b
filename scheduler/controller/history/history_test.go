package history

import (
	"errors"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

func template(image string) *corev1.PodTemplateSpec {
	return &corev1.PodTemplateSpec{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: image}}}}
}

func rev(t *testing.T, number int64, image string) *appsv1.ControllerRevision {
	t.Helper()
	data, err := Data(template(image))
	if err != nil {
		t.Fatal(err)
	}
	return &appsv1.ControllerRevision{ObjectMeta: metav1.ObjectMeta{Name: image}, Revision: number, Data: runtime.RawExtension{Raw: data}}
}

func TestChoose(t *testing.T) {
	revs := []*appsv1.ControllerRevision{rev(t, 4, "b"), rev(t, 1, "a"), rev(t, 7, "c")}
	Sort(revs)
	if revs[0].Revision != 1 || revs[2].Revision != 7 {
		t.Fatalf("order %v %v %v", revs[0].Revision, revs[1].Revision, revs[2].Revision)
	}
	for _, tc := range []struct {
		image, have string
		number      int64
	}{{"c", "c", 7}, {"a", "a", 8}, {"new", "", 8}} {
		c := Choose(revs, template(tc.image))
		if have := c.Have; (have == nil) != (tc.have == "") || have != nil && have.Name != tc.have || c.Number != tc.number {
			t.Errorf("%s: %+v", tc.image, c)
		}
	}
	if c := Choose(nil, template("a")); c.Have != nil || c.Number != 1 {
		t.Errorf("the first: %+v", c)
	}
	names := func(rs []*appsv1.ControllerRevision) (s string) {
		for _, r := range rs {
			s += r.Name
		}
		return s
	}
	for limit, want := range map[int32]string{-1: "", 0: "ab", 1: "a", 2: "", 9: ""} {
		if got := names(Obsolete(revs, map[string]bool{"c": true}, limit)); got != want {
			t.Errorf("obsolete beyond %d: %q, want %q", limit, got, want)
		}
	}
}

func TestTemplate(t *testing.T) {
	got, err := Template(rev(t, 1, "x"))
	if err != nil || got.Spec.Containers[0].Image != "x" {
		t.Errorf("%+v, %v", got, err)
	}
	for _, raw := range []string{"", "{", `{"spec":{}}`, `[]`, `{"spec":{"template":7}}`} {
		if _, err := Template(&appsv1.ControllerRevision{Data: runtime.RawExtension{Raw: []byte(raw)}}); !errors.Is(err, ErrData) {
			t.Errorf("%q: %v, want ErrData", raw, err)
		}
	}
}

func FuzzTemplate(f *testing.F) {
	f.Add([]byte(`{"spec":{"template":{"$patch":"replace","spec":{"containers":[{"name":"c"}]}}}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r := &appsv1.ControllerRevision{Data: runtime.RawExtension{Raw: raw}}
		tmpl, err := Template(r)
		if err != nil {
			return
		}
		data, err := Data(tmpl)
		if err != nil {
			t.Fatal(err)
		}
		if !Holds(&appsv1.ControllerRevision{Data: runtime.RawExtension{Raw: data}}, tmpl) {
			t.Errorf("%s does not hold what it was made of", data)
		}
	})
}
