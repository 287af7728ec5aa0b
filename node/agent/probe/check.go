package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	utilexec "k8s.io/utils/exec"
)

// maxOutput is how much of an answer is kept, in bytes.
const maxOutput = 10 << 10

// userAgent is what probes call themselves; images match on its beginning.
const userAgent = "kube-probe/1.36"

// Outcome of one check.
type Outcome int

// Outcomes. Broken says that the check itself could not be done: it counts neither way.
const (
	OK Outcome = iota
	Warning
	Failed
	Broken
)

// Exec runs a command in a container, as CRI's ExecSync: a non-zero exit is an error with an ExitStatus.
type Exec func(ctx context.Context, containerID string, cmd []string, timeout time.Duration) (stdout, stderr []byte, err error)

// Port resolves a container's port by number or name.
func Port(p intstr.IntOrString, c *corev1.Container) (int, error) {
	n := p.IntValue()
	if p.Type == intstr.String {
		found := false
		for i := range c.Ports {
			if c.Ports[i].Name == p.StrVal {
				n, found = int(c.Ports[i].ContainerPort), true
				break
			}
		}
		if !found {
			v, err := strconv.Atoi(p.StrVal)
			if err != nil {
				return 0, fmt.Errorf("container %s has no port named %q", c.Name, p.StrVal)
			}
			n = v
		}
	}
	if n < 1 || n > 65535 {
		return 0, fmt.Errorf("invalid port number: %d", n)
	}
	return n, nil
}

// Request makes the request of an httpGet action. agent is the second half of the default User-Agent, "probe" or "lifecycle".
func Request(ctx context.Context, a *corev1.HTTPGetAction, c *corev1.Container, podIP, agent string) (*http.Request, error) {
	port, err := Port(a.Port, c)
	if err != nil {
		return nil, err
	}
	host := a.Host
	if host == "" {
		host = podIP
	}
	u, err := url.Parse(a.Path)
	if err != nil {
		u = &url.URL{Path: a.Path}
	}
	u.Scheme = strings.ToLower(string(a.Scheme))
	if u.Scheme == "" {
		u.Scheme = "http"
	}
	u.Host = net.JoinHostPort(host, strconv.Itoa(port))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for _, h := range a.HTTPHeaders {
		req.Header.Add(h.Name, h.Value)
	}
	if _, ok := req.Header["User-Agent"]; !ok {
		req.Header.Set("User-Agent", strings.Replace(userAgent, "probe", agent, 1))
	}
	if _, ok := req.Header["Accept"]; !ok {
		req.Header.Set("Accept", "*/*")
	} else if req.Header.Get("Accept") == "" {
		req.Header.Del("Accept")
	}
	if h := req.Header.Get("Host"); h != "" {
		req.Host = h
	}
	return req, nil
}

// dialer closes with a reset, so that a probe leaves no socket in TIME_WAIT behind.
func dialer() *net.Dialer {
	return &net.Dialer{ControlContext: lingerZero}
}

// newClient makes the client of http probes: no keep-alive, no certificate check (the pod has no name to check), redirects
// followed only within the same host.
func newClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true, //nolint:gosec // see above
			Proxy: nil, DisableCompression: true, DialContext: dialer().DialContext},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if req.URL.Hostname() != via[0].URL.Hostname() {
				return http.ErrUseLastResponse
			}
			if len(via) >= 10 {
				return errors.New("stopped after 10 redirects")
			}
			return nil
		},
	}
}

// check does one probe.
func (p *Prober) check(ctx context.Context, t Target, spec *corev1.Probe) (Outcome, string) {
	timeout := time.Duration(max(spec.TimeoutSeconds, 1)) * time.Second
	if spec.Exec != nil {
		return p.exec(ctx, t, spec.Exec.Command, timeout)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	switch {
	case spec.HTTPGet != nil:
		return p.http(ctx, t, spec.HTTPGet)
	case spec.TCPSocket != nil:
		port, err := Port(spec.TCPSocket.Port, t.Container)
		if err != nil {
			return Broken, err.Error()
		}
		host := spec.TCPSocket.Host
		if host == "" {
			host = t.PodIP
		}
		conn, err := dialer().DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err != nil {
			return Failed, err.Error()
		}
		_ = conn.Close()
		return OK, ""
	case spec.GRPC != nil:
		return checkGRPC(ctx, t.PodIP, spec.GRPC, timeout)
	}
	return Broken, "the probe has no handler"
}

func (p *Prober) exec(ctx context.Context, t Target, cmd []string, timeout time.Duration) (Outcome, string) {
	// The runtime keeps the time and kills the command; the context is only a net below it.
	ctx, cancel := context.WithTimeout(ctx, timeout+10*time.Second)
	defer cancel()
	stdout, stderr, err := p.cfg.Exec(ctx, t.ContainerID, cmd, timeout)
	out := string(append(stdout, stderr...))
	out = out[:min(len(out), maxOutput)]
	if err == nil {
		return OK, out
	}
	var exit utilexec.ExitError
	if errors.As(err, &exit) {
		if exit.ExitStatus() == 0 {
			return OK, out
		}
		return Failed, out
	}
	if s, ok := status.FromError(err); ok && s.Code() == codes.DeadlineExceeded || strings.Contains(err.Error(), "timed out") || errors.Is(err, context.DeadlineExceeded) {
		return Failed, fmt.Sprintf("command timed out: %q timed out after %v", strings.Join(cmd, " "), timeout)
	}
	return Broken, err.Error()
}

func (p *Prober) http(ctx context.Context, t Target, a *corev1.HTTPGetAction) (Outcome, string) {
	req, err := Request(ctx, a, t.Container, t.PodIP, "probe")
	if err != nil {
		return Broken, err.Error()
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return Failed, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxOutput))
	if err != nil {
		return Failed, err.Error()
	}
	switch {
	case resp.StatusCode >= 200 && resp.StatusCode < 300:
		return OK, string(body)
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		return Warning, "Probe terminated redirects, Response body: " + string(body)
	}
	return Failed, fmt.Sprintf("HTTP probe failed with statuscode: %d", resp.StatusCode)
}

func checkGRPC(ctx context.Context, host string, a *corev1.GRPCAction, timeout time.Duration) (Outcome, string) {
	addr := net.JoinHostPort(host, strconv.Itoa(int(a.Port)))
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUserAgent(userAgent),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return dialer().DialContext(ctx, "tcp", addr)
		}))
	if err != nil {
		return Failed, fmt.Sprintf("error: failed to connect service at %q: %v", addr, err)
	}
	defer conn.Close()
	service := ""
	if a.Service != nil {
		service = *a.Service
	}
	resp, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: service})
	switch status.Code(err) {
	case codes.OK:
	case codes.Unimplemented:
		return Failed, "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): " + status.Convert(err).Message()
	case codes.DeadlineExceeded:
		return Failed, fmt.Sprintf("timeout: health rpc did not complete within %v", timeout)
	case codes.Unavailable:
		return Failed, fmt.Sprintf("error: failed to connect service at %q: %v", addr, status.Convert(err).Message())
	default:
		return Failed, fmt.Sprintf("error: health rpc probe failed: %v", err)
	}
	if resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		return Failed, fmt.Sprintf("service unhealthy (responded with %q)", resp.GetStatus())
	}
	return OK, "service healthy"
}
