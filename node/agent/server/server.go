// Package server is the agent's HTTPS API on port 10250, as Kubernetes' API server calls it: container logs, exec, attach,
// port-forward, and what the node's pods use.
//
// Contract: the TLS listener has verified the client's certificate against the cluster's CA, if it showed one; a request
// without one is refused, except for /healthz. Every other request is authorised as upstream's kubelet does it: resource
// nodes, subresource by path, verb by method, asked of the cluster's authorizer through Config.Authorize. Streams end with
// the request. The daemon owns the listener and mounts the handler; nobody else calls it.
package server

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/proxy"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/agent/usage"
)

// User is who calls, by his certificate.
type User struct {
	Name   string
	Groups []string
}

// Attributes are what a request wants, in the terms of a SubjectAccessReview.
type Attributes struct {
	Verb        string // get, create, update, patch or delete
	Subresource string // of resource nodes: proxy, log, stats, metrics, pods, healthz
}

// Config of a Server.
type Config struct {
	// NodeName is this node's name. Required.
	NodeName string
	// Pods returns this node's pods. Required.
	Pods func() []*corev1.Pod
	// Pod returns one of them, or nil. Required.
	Pod func(namespace, name string) *corev1.Pod
	// Runtime is the container runtime. Required.
	Runtime internalapi.RuntimeService
	// ReadLog copies a container's log. Required.
	ReadLog ReadLog
	// Authorize decides on a request; the reason is shown to the client. Required.
	Authorize func(ctx context.Context, u User, a Attributes) (allowed bool, reason string, err error)
	// Metrics of other parts of the node, shown below those of the pods. Optional.
	Metrics prometheus.Gatherer
	// Healthy returns why the agent is not well; nil function or nil error: it is.
	Healthy func() error
	// Extra handles paths of its own, which authenticate their callers themselves; path prefixes end in a slash.
	Extra map[string]http.Handler
	// Logger; nil discards.
	Logger *slog.Logger
}

// Validate reports every fault at once.
func (c Config) Validate() error {
	var errs []error
	for what, missing := range map[string]bool{"NodeName": c.NodeName == "", "Pods": c.Pods == nil, "Pod": c.Pod == nil,
		"Runtime": c.Runtime == nil, "ReadLog": c.ReadLog == nil, "Authorize": c.Authorize == nil} {
		if missing {
			errs = append(errs, fmt.Errorf("agent server: %s is missing", what))
		}
	}
	return errors.Join(errs...)
}

// Server is the handler.
type Server struct {
	cfg     Config
	mux     *http.ServeMux
	sampler *usage.Sampler
}

// New makes a Server; it listens nowhere.
func New(cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, mux: http.NewServeMux()}
	s.sampler = usage.NewSampler(s.sample)
	s.mux.HandleFunc("/healthz", s.healthz)
	s.mux.HandleFunc("GET /pods", s.guard("pods", s.pods))
	s.mux.HandleFunc("GET /pods/", s.guard("pods", s.pods))
	s.mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", s.guard("log", s.logs))
	for _, m := range []string{"GET", "POST"} {
		s.mux.HandleFunc(m+" /exec/{namespace}/{pod}/{container}", s.guard("exec", s.exec))
		s.mux.HandleFunc(m+" /attach/{namespace}/{pod}/{container}", s.guard("attach", s.attach))
		s.mux.HandleFunc(m+" /portForward/{namespace}/{pod}", s.guard("portforward", s.portForward))
	}
	s.mux.HandleFunc("GET /stats/summary", s.guard("stats", s.summary))
	s.mux.HandleFunc("GET /stats/usage", s.guard("stats", s.usage))
	s.mux.HandleFunc("GET /metrics", s.guard("metrics", s.metrics))
	for prefix, h := range cfg.Extra {
		s.mux.Handle(prefix, h)
	}
	return s, nil
}

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// caller is who the verified certificate names, as Kubernetes maps it: common name and organizations.
func caller(certs []*x509.Certificate) (User, bool) {
	if len(certs) == 0 || certs[0].Subject.CommonName == "" {
		return User{}, false
	}
	return User{Name: certs[0].Subject.CommonName, Groups: append(slices.Clone(certs[0].Subject.Organization), "system:authenticated")}, true
}

// verbs of the methods, as pkg/kubelet/server/auth.go of Kubernetes maps them.
var verbs = map[string]string{http.MethodPost: "create", http.MethodGet: "get", http.MethodHead: "get", http.MethodPut: "update",
	http.MethodPatch: "patch", http.MethodDelete: "delete"}

// subresources of the paths, ditto; all else is "proxy".
var subresources = map[string]string{"log": "log", "stats": "stats", "metrics": "metrics", "pods": "pods"}

// guard lets authorised callers through.
func (s *Server) guard(what string, h http.HandlerFunc) http.HandlerFunc {
	sub, ok := subresources[what]
	if !ok || what == "log" || what == "pods" { // containerLogs and pods are proxied paths in upstream's table
		sub = "proxy"
	}
	return func(w http.ResponseWriter, r *http.Request) {
		var certs []*x509.Certificate
		if r.TLS != nil {
			certs = r.TLS.PeerCertificates
		}
		u, ok := caller(certs)
		if !ok {
			http.Error(w, "Unauthorized: a client certificate of this cluster's CA is needed", http.StatusUnauthorized)
			return
		}
		a := Attributes{Verb: verbs[r.Method], Subresource: sub}
		allowed, reason, err := s.cfg.Authorize(r.Context(), u, a)
		switch {
		case err != nil:
			http.Error(w, fmt.Sprintf("Authorization of user %q could not be checked: %v", u.Name, err), http.StatusInternalServerError)
		case !allowed:
			msg := fmt.Sprintf("Forbidden (user=%s, verb=%s, resource=nodes, subresource=%s, node=%s)", u.Name, a.Verb, a.Subresource, s.cfg.NodeName)
			if reason != "" {
				msg += ": " + reason
			}
			http.Error(w, msg, http.StatusForbidden)
		default:
			h(w, r)
		}
	}
}

func (s *Server) healthz(w http.ResponseWriter, _ *http.Request) {
	if s.cfg.Healthy != nil {
		if err := s.cfg.Healthy(); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	fmt.Fprint(w, "ok")
}

func (s *Server) pods(w http.ResponseWriter, _ *http.Request) {
	l := corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, Items: []corev1.Pod{}}
	for _, p := range s.cfg.Pods() {
		l.Items = append(l.Items, *p)
	}
	writeJSON(w, l)
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client went away
}

// statusError is an answer with a code.
type statusError struct {
	code int
	msg  string
}

func (e *statusError) Error() string { return e.msg }

func refuse(code int, format string, a ...any) error {
	return &statusError{code, fmt.Sprintf(format, a...)}
}

func fail(w http.ResponseWriter, err error) {
	code := http.StatusInternalServerError
	var se *statusError
	if errors.As(err, &se) {
		code = se.code
	}
	http.Error(w, err.Error(), code)
}

// exec starts a command in a container; the runtime's own streaming server carries the streams, whatever the protocol.
func (s *Server) exec(w http.ResponseWriter, r *http.Request) {
	c, err := s.container(r, false)
	if err != nil {
		fail(w, err)
		return
	}
	q := r.URL.Query()
	in, out, errOut, tty, err := streams(q)
	if err != nil {
		fail(w, err)
		return
	}
	resp, err := s.cfg.Runtime.Exec(r.Context(), &runtimeapi.ExecRequest{ContainerId: c.Id, Cmd: q["command"], Stdin: in, Stdout: out, Stderr: errOut, Tty: tty})
	s.proxy(w, r, resp.GetUrl(), err)
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request) {
	c, err := s.container(r, false)
	if err != nil {
		fail(w, err)
		return
	}
	in, out, errOut, tty, err := streams(r.URL.Query())
	if err != nil {
		fail(w, err)
		return
	}
	resp, err := s.cfg.Runtime.Attach(r.Context(), &runtimeapi.AttachRequest{ContainerId: c.Id, Stdin: in, Stdout: out, Stderr: errOut, Tty: tty})
	s.proxy(w, r, resp.GetUrl(), err)
}

func (s *Server) portForward(w http.ResponseWriter, r *http.Request) {
	pod, err := s.pod(r)
	if err != nil {
		fail(w, err)
		return
	}
	boxes, err := s.cfg.Runtime.ListPodSandbox(r.Context(), &runtimeapi.PodSandboxFilter{
		LabelSelector: map[string]string{labelUID: string(pod.UID)},
		State:         &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}})
	if err == nil && len(boxes) == 0 {
		err = refuse(http.StatusNotFound, "pod %s/%s has no running sandbox", pod.Namespace, pod.Name)
	}
	if err != nil {
		fail(w, err)
		return
	}
	var ports []int32
	for _, p := range r.URL.Query()["port"] { // websocket clients name the ports in the URL
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil {
			fail(w, refuse(http.StatusBadRequest, "port %q: want a number below 65536", p))
			return
		}
		ports = append(ports, int32(n))
	}
	resp, err := s.cfg.Runtime.PortForward(r.Context(), &runtimeapi.PortForwardRequest{PodSandboxId: boxes[0].Id, Port: ports})
	s.proxy(w, r, resp.GetUrl(), err)
}

// streams reads which streams a client wants; at least one, and a terminal has no separate stderr.
func streams(q url.Values) (in, out, errOut, tty bool, err error) {
	on := func(k string) bool { v := q.Get(k); return v == "1" || strings.EqualFold(v, "true") }
	in, out, errOut, tty = on("input") || on("stdin"), on("output") || on("stdout"), on("error") || on("stderr"), on("tty")
	if tty {
		errOut = false
	}
	if !in && !out && !errOut {
		err = refuse(http.StatusBadRequest, "you must specify at least 1 of stdin, stdout, stderr")
	}
	return
}

// proxy hands the connection to the runtime's streaming server, whose URL is good for one use.
func (s *Server) proxy(w http.ResponseWriter, r *http.Request, at string, err error) {
	if err != nil {
		fail(w, err)
		return
	}
	u, err := url.Parse(at)
	if err != nil {
		fail(w, fmt.Errorf("the runtime's streaming address %q: %w", at, err))
		return
	}
	h := proxy.NewUpgradeAwareHandler(u, nil, false, true, responder{s.cfg.Logger})
	h.ServeHTTP(w, r)
}

type responder struct{ log *slog.Logger }

func (p responder) Error(w http.ResponseWriter, r *http.Request, err error) {
	p.log.Warn("stream failed", "path", r.URL.Path, "err", err)
	http.Error(w, err.Error(), http.StatusInternalServerError)
}

// parseLogOptions reads the query as the API's PodLogOptions and refuses what makes no sense. (The scheme's own conversion
// from a query is generated in k8s.io/kubernetes and not to be had from client-go.)
func parseLogOptions(q url.Values) (*corev1.PodLogOptions, error) {
	o := &corev1.PodLogOptions{Container: q.Get("container")}
	var bad []string
	number := func(key string) *int64 {
		v := q.Get(key)
		if v == "" {
			return nil
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			bad = append(bad, fmt.Sprintf("%s %q is no number", key, v))
			return nil
		}
		return &n
	}
	truth := func(key string) bool {
		if !q.Has(key) {
			return false
		}
		b, err := strconv.ParseBool(q.Get(key))
		return b || err != nil && q.Get(key) == "" // "?follow" alone means follow, as for the API server
	}
	o.Follow, o.Previous, o.Timestamps = truth("follow"), truth("previous"), truth("timestamps")
	o.TailLines, o.LimitBytes, o.SinceSeconds = number("tailLines"), number("limitBytes"), number("sinceSeconds")
	if v := q.Get("sinceTime"); v != "" {
		t, err := time.Parse(time.RFC3339, v)
		if err != nil {
			bad = append(bad, fmt.Sprintf("sinceTime %q is no RFC 3339 time", v))
		}
		o.SinceTime = &metav1.Time{Time: t}
	}
	if v := q.Get("stream"); v != "" {
		o.Stream = &v
	}
	if o.TailLines != nil && *o.TailLines < 0 {
		bad = append(bad, "tailLines must not be negative")
	}
	if o.LimitBytes != nil && *o.LimitBytes < 1 {
		bad = append(bad, "limitBytes must be greater than 0")
	}
	if o.SinceSeconds != nil && *o.SinceSeconds < 1 {
		bad = append(bad, "sinceSeconds must be greater than 0")
	}
	if o.SinceSeconds != nil && o.SinceTime != nil {
		bad = append(bad, "at most one of sinceTime and sinceSeconds may be given")
	}
	if o.Stream != nil && !slices.Contains([]string{corev1.LogStreamAll, corev1.LogStreamStdout, corev1.LogStreamStderr}, *o.Stream) {
		bad = append(bad, fmt.Sprintf("stream %q: want All, Stdout or Stderr", *o.Stream))
	}
	if len(bad) > 0 {
		return nil, refuse(http.StatusUnprocessableEntity, "log options: %s", strings.Join(bad, "; "))
	}
	return o, nil
}

// timeNow is where the server meets the clock: log options count back from it.
func timeNow() time.Time { return time.Now() }
