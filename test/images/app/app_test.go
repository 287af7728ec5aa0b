package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func fetchText(t *testing.T, url string) (int, string) {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

func TestWebPaths(t *testing.T) {
	srv := httptest.NewServer(handler(self{"p", "n", "192.0.2.1"}))
	defer srv.Close()
	t.Setenv("SOME_VARIABLE", "here")
	file := t.TempDir() + "/f"
	if err := os.WriteFile(file, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		code int
		want string
	}{
		{"/some/path", 200, "pod=p node=n ip=192.0.2.1 peer=127.0.0.1:"},
		{"/some/path", 200, "path=/some/path"},
		{"/healthz", 200, "ok"},
		{"/healthz?set=fail", 500, "told to fail"},
		{"/healthz", 500, "told to fail"},
		{"/healthz?set=ok", 200, "ok"},
		{"/env", 200, "SOME_VARIABLE=here"},
		{"/slow?ms=1", 200, "path=/slow"},
		{"/file?path=" + file, 200, "content"},
		{"/file?path=" + file + "x", 404, "no such file"},
		{"/get?url=" + srv.URL + "/inner", 200, "path=/inner"},
		{"/get?url=" + srv.URL + "/healthz%3Fset=fail", 502, "500"},
		{"/dns?name=localhost", 200, "127.0.0.1"},
	} {
		if code, body := fetchText(t, srv.URL+c.path); code != c.code || !strings.Contains(body, c.want) {
			t.Errorf("%s: %d %q, want %d with %q", c.path, code, body, c.code, c.want)
		}
	}
}

// free gives an address that nobody listens on; the servers of the program take addresses, not listeners.
func free(t *testing.T, network string) string {
	t.Helper()
	if network == "udp" {
		c, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.LocalAddr().String()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// serve runs a server of the program until the test ends.
func serve(t *testing.T, run func(context.Context, []string) error, args ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, args) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
}

func TestEchoServers(t *testing.T) {
	t.Setenv("POD_NAME", "me")
	for _, c := range []struct {
		network string
		server  func(context.Context, []string) error
		client  func(context.Context, []string) error
	}{{"tcp", serveTCP, tcp}, {"udp", serveUDP, udp}} {
		addr := free(t, c.network)
		serve(t, c.server, addr)
		var out string
		var err error
		for range 100 {
			out, err = capture(t, func() error { return c.client(t.Context(), []string{addr, "hi"}) })
			if err == nil {
				break
			}
			time.Sleep(10 * time.Millisecond) // until it listens
		}
		if want := "me hi from " + addr + "\n"; out != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", c.network, out, err, want)
		}
	}
}

// capture gives what f prints.
func capture(t *testing.T, f func() error) (string, error) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	old := os.Stdout
	os.Stdout = w
	ferr := f()
	os.Stdout = old
	w.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b), ferr
}

// TestGRPCHealth asks with the real library, as a probe does.
func TestGRPCHealth(t *testing.T) {
	for status, want := range map[string]grpc_health_v1.HealthCheckResponse_ServingStatus{
		"1": grpc_health_v1.HealthCheckResponse_SERVING, "2": grpc_health_v1.HealthCheckResponse_NOT_SERVING} {
		addr := free(t, "tcp")
		serve(t, serveGRPC, addr, status)
		cc, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer cc.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		res, err := grpc_health_v1.NewHealthClient(cc).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "x"}, grpc.WaitForReady(true))
		if err != nil || res.Status != want {
			t.Errorf("status %v, %v; want %v", res, err, want)
		}
	}
}

func TestCrash(t *testing.T) {
	var code exitCode
	if err := crash(t.Context(), []string{"7"}); !errors.As(err, &code) || code != 7 {
		t.Errorf("error %v, want exit 7", err)
	}
}
