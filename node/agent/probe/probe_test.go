package probe

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	utilexec "k8s.io/utils/exec"
)

func listen(t *testing.T) (net.Listener, int32) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, int32(l.Addr().(*net.TCPAddr).Port)
}

func prober(exec Exec) *Prober { return New(Config{Exec: exec, Notify: func(*corev1.Pod) {}}) }

func target() Target {
	return Target{Pod: &corev1.Pod{}, Container: &corev1.Container{Name: "c", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 1234}}}, ContainerID: "id", PodIP: "127.0.0.1"}
}

func TestHTTP(t *testing.T) {
	var got *http.Request
	mux := http.NewServeMux()
	mux.HandleFunc("/ok", func(w http.ResponseWriter, r *http.Request) { got = r })
	mux.HandleFunc("/bad", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "secret text", 503) })
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://other.invalid/", http.StatusFound)
	})
	mux.HandleFunc("/near", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/bad", http.StatusFound) })
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	for _, tls := range []bool{false, true} {
		srv := httptest.NewUnstartedServer(mux)
		scheme := corev1.URISchemeHTTP
		if tls {
			srv.StartTLS()
			scheme = corev1.URISchemeHTTPS
		} else {
			srv.Start()
		}
		u, _ := url.Parse(srv.URL)
		port, _ := strconv.Atoi(u.Port())
		for path, want := range map[string]struct {
			out Outcome
			msg string
		}{"/ok?a=b": {OK, ""}, "/bad": {Failed, "HTTP probe failed with statuscode: 503"}, "/away": {Warning, "Probe terminated redirects"}, "/near": {Failed, "503"}, "/slow": {Failed, "deadline"}} {
			spec := &corev1.Probe{TimeoutSeconds: 1, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Scheme: scheme, Path: path, Port: intstr.FromInt(port),
				HTTPHeaders: []corev1.HTTPHeader{{Name: "Host", Value: "my.host"}, {Name: "X-A", Value: "b"}}}}}
			out, msg := prober(nil).check(t.Context(), target(), spec)
			if out != want.out || !strings.Contains(strings.ToLower(msg), strings.ToLower(want.msg)) || strings.Contains(msg, "secret text") {
				t.Errorf("tls %v, %s: %v %q, want %v", tls, path, out, msg, want)
			}
		}
		if got.Host != "my.host" || got.Header.Get("X-A") != "b" || got.Header.Get("User-Agent") != "kube-probe/1.36" || got.Header.Get("Accept") != "*/*" || got.URL.RawQuery != "a=b" {
			t.Errorf("request: %v %v %v", got.Host, got.URL, got.Header)
		}
		srv.Close()
	}
}

func TestTCPAndPorts(t *testing.T) {
	_, port := listen(t)
	tcp := func(p intstr.IntOrString) *corev1.Probe {
		return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: p}}}
	}
	tg := target()
	tg.Container.Ports[0].ContainerPort = port
	for _, c := range []struct {
		p    intstr.IntOrString
		want Outcome
	}{{intstr.FromInt32(port), OK}, {intstr.FromString("web"), OK}, {intstr.FromString("none"), Broken}, {intstr.FromInt32(0), Broken}, {intstr.FromInt32(1), Failed}} {
		if out, msg := prober(nil).check(t.Context(), tg, tcp(c.p)); out != c.want {
			t.Errorf("%v: %v %s, want %v", c.p, out, msg, c.want)
		}
	}
}

func TestGRPC(t *testing.T) {
	l, port := listen(t)
	hs := health.NewServer()
	srv := grpc.NewServer()
	healthpb.RegisterHealthServer(srv, hs)
	go func() { _ = srv.Serve(l) }()
	defer srv.Stop()
	check := func(service string) (Outcome, string) {
		return prober(nil).check(t.Context(), target(), &corev1.Probe{TimeoutSeconds: 1, ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: port, Service: &service}}})
	}
	hs.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
	hs.SetServingStatus("sick", healthpb.HealthCheckResponse_NOT_SERVING)
	if out, msg := check(""); out != OK {
		t.Errorf("%v %s", out, msg)
	}
	if out, msg := check("sick"); out != Failed || msg != `service unhealthy (responded with "NOT_SERVING")` {
		t.Errorf("%v %s", out, msg)
	}
	if out, _ := check("none"); out != Failed {
		t.Errorf("unknown service: %v", out)
	}
	srv.Stop()
	if out, msg := check(""); out != Failed || !strings.Contains(msg, "failed to connect") {
		t.Errorf("%v %s", out, msg)
	}
}

func TestExec(t *testing.T) {
	for _, c := range []struct {
		err  error
		want Outcome
	}{{nil, OK}, {utilexec.CodeExitError{Err: errors.New("x"), Code: 2}, Failed}, {status.Error(codes.DeadlineExceeded, "x"), Failed}, {errors.New("runtime is away"), Broken}} {
		p := prober(func(_ context.Context, id string, cmd []string, timeout time.Duration) ([]byte, []byte, error) {
			if id != "id" || cmd[0] != "cmd" || timeout != 3*time.Second {
				t.Errorf("%s %v %v", id, cmd, timeout)
			}
			return []byte("out"), []byte("err"), c.err
		})
		out, msg := p.check(t.Context(), target(), &corev1.Probe{TimeoutSeconds: 3, ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"cmd"}}}})
		if out != c.want || c.want == Failed && c.err != nil && status.Code(c.err) == codes.Unknown && msg != "outerr" {
			t.Errorf("%v: %v %q, want %v", c.err, out, msg, c.want)
		}
	}
}
