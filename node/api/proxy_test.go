package api

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The proxies of pods and of Services reach what serves in pods, over TLS too: with whatever certificate it made for itself.
func TestProxyReachesPods(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	const ip = "10.222.0.7"
	serve := func(port string, start func(http.Handler) *httptest.Server) {
		s := start(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s %s", port, r.URL.Path) }))
		t.Cleanup(s.Close)
		key := net.JoinHostPort(ip, port)
		cluster.routes.Store(key, s.Listener.Addr().String())
		t.Cleanup(func() { cluster.routes.Delete(key) })
	}
	serve("160", httptest.NewServer)
	serve("460", httptest.NewTLSServer)
	pod := bound(t, k, ns, "porter", "nowhere", func(s *corev1.PodSpec) {
		s.Containers[0].Ports = []corev1.ContainerPort{{ContainerPort: 160}, {ContainerPort: 460}}
	})
	pod.Status.PodIP, pod.Status.PodIPs = ip, []corev1.PodIP{{IP: ip}}
	if _, err := k.CoreV1().Pods(ns).UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	ports := []corev1.ServicePort{{Name: "plain", Port: 80}, {Name: "tls", Port: 443}}
	if _, err := k.CoreV1().Services(ns).Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "svc"}, Spec: corev1.ServiceSpec{Ports: ports}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.CoreV1().Endpoints(ns).Create(ctx, &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{Name: "svc"}, Subsets: []corev1.EndpointSubset{{
		Addresses: []corev1.EndpointAddress{{IP: ip, TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: ns, Name: pod.Name, UID: pod.UID}}},
		Ports:     []corev1.EndpointPort{{Name: "plain", Port: 160}, {Name: "tls", Port: 460}},
	}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"pods/porter/proxy/a":                  "160 /a",
		"pods/http:porter:160/proxy/b":         "160 /b",
		"pods/https:porter:460/proxy/c":        "460 /c",
		"services/svc:plain/proxy/d":           "160 /d",
		"services/https:svc:tls/proxy/e":       "460 /e",
		"services/https:svc:443/proxy/f/g?h=i": "460 /f/g",
	} {
		b, err := k.CoreV1().RESTClient().Get().RequestURI("/api/v1/namespaces/" + ns + "/" + path).DoRaw(ctx)
		if err != nil || string(b) != want {
			t.Errorf("%s: %q, %v; want %q", path, b, err, want)
		}
	}
}
