package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/framer"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
)

// Events that are sent with what is stored have the objects that upstream would send, byte for byte.
func TestRawEventsAreUpstreams(t *testing.T) {
	cfg := cluster.as(cluster.servers[0], "admin", "system:masters")
	cfg.ContentType, cfg.AcceptContentTypes = protobuf, protobuf
	k, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, ns := t.Context(), namespace(t, k)
	r := k.CoreV1().RESTClient()
	watches := map[string]func() (kind string, object []byte){}
	for _, media := range []string{protobuf, runtime.ContentTypeJSON} {
		for _, selector := range []string{"", "!there-is-no-such-label"} {
			accept := media
			if media == protobuf {
				accept += ";stream=watch"
			}
			body, err := r.Get().Namespace(ns).Resource("pods").SetHeader("Accept", accept).Param("watch", "1").Param("labelSelector", selector).Stream(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer body.Close()
			watches[media+" "+selector] = events(t, media, body)
		}
	}
	// next compares the events of the next change with a read, which upstream answers.
	next := func(kind, name string) {
		t.Helper()
		for what, next := range watches {
			media := protobuf
			if bytes.HasPrefix([]byte(what), []byte(runtime.ContentTypeJSON)) {
				media = runtime.ContentTypeJSON
			}
			got, object := next()
			want, err := r.Get().Namespace(ns).Resource("pods").Name(name).Param("resourceVersion", "0").SetHeader("Accept", media).Do(ctx).Raw()
			if err != nil {
				t.Fatal(err)
			}
			if got != kind || !bytes.Equal(bytes.TrimSpace(object), bytes.TrimSpace(want)) {
				t.Fatalf("%s: %s %q, want %s %q", what, got, object, kind, want)
			}
		}
	}
	for i := range 90 { // upstream encodes the first ones
		name := fmt.Sprint("p", i/30)
		kind := "MODIFIED"
		if i%30 == 0 {
			kind = "ADDED"
			_, err = k.CoreV1().Pods(ns).Create(ctx, simplePod(name), metav1.CreateOptions{})
		} else {
			_, err = k.CoreV1().Pods(ns).Patch(ctx, name, types.StrategicMergePatchType, fmt.Appendf(nil, `{"status":{"message":"m%d"}}`, i), metav1.PatchOptions{}, "status")
		}
		if err != nil {
			t.Fatal(err)
		}
		next(kind, name)
	}
	storeOld(t, ns, "p0", "old") // as a version without today's defaults
	next("ADDED", "old")
	storeOld(t, ns, "p1", "old")
	next("MODIFIED", "old")
	if err := k.CoreV1().Pods(ns).Delete(ctx, "p2", *metav1.NewDeleteOptions(0)); err != nil {
		t.Fatal(err)
	}
	var at string
	for what, next := range watches {
		kind, object := next()
		for kind == "MODIFIED" { // it ends
			kind, object = next()
		}
		o, _, err := scheme.Codecs.UniversalDeserializer().Decode(object, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		p := o.(*corev1.Pod)
		if kind != "DELETED" || p.Name != "p2" || p.Status.Message != "m89" || at != "" && p.ResourceVersion != at {
			t.Errorf("%s: %s %v", what, kind, p)
		}
		at = p.ResourceVersion
	}
}

// events gives the events of a watch, one after the other.
func events(t *testing.T, media string, body io.ReadCloser) func() (kind string, object []byte) {
	if media == runtime.ContentTypeJSON {
		d := json.NewDecoder(body)
		return func() (string, []byte) {
			var e struct {
				Type   string
				Object json.RawMessage
			}
			if err := d.Decode(&e); err != nil {
				t.Fatal(err)
			}
			return e.Type, e.Object
		}
	}
	frames, b := framer.NewLengthDelimitedFrameReader(body), make([]byte, 1<<16)
	return func() (string, []byte) {
		n, err := frames.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		var e metav1.WatchEvent
		if err := e.Unmarshal(b[:n]); err != nil {
			t.Fatal(err)
		}
		return e.Type, bytes.Clone(e.Object.Raw)
	}
}
