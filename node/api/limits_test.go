package api

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	auditv1 "k8s.io/apiserver/pkg/apis/audit/v1"
	"k8s.io/apiserver/pkg/apis/flowcontrol/bootstrap"
	restclient "k8s.io/client-go/rest"
	"skein.io/skein/node/api/access"
)

// lines is a log that can be read while it is written.
type lines struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) find(parts ...string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
next:
	for line := range strings.Lines(l.b.String()) {
		for _, p := range parts {
			if !strings.Contains(line, p) {
				continue next
			}
		}
		return line
	}
	return ""
}

// Bodies, watches and lines of the log, on one server with small limits.
func TestLimits(t *testing.T) {
	ctx, log := t.Context(), &lines{}
	s := another(t, func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(log, nil))
		c.RequestLog = ptr(slog.LevelInfo)
		c.Limits = Limits{Watches: 40, UserWatches: 20}
	})
	k := client(t, cluster.as(s, "admin", "system:masters"))
	ns := namespace(t, k)
	for _, u := range []string{"w1", "w2"} {
		b := roleBinding("edit", "User", u)
		b.Name = u
		if _, err := k.RbacV1().RoleBindings(ns).Create(ctx, b, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	w1, w2 := client(t, cluster.as(s, "w1")), client(t, cluster.as(s, "w2"))
	eventually(t, func(ctx context.Context) error {
		_, err := w1.CoreV1().ConfigMaps(ns).List(ctx, metav1.ListOptions{})
		return err
	})
	eventually(t, func(ctx context.Context) error {
		_, err := w2.CoreV1().ConfigMaps(ns).List(ctx, metav1.ListOptions{})
		return err
	})

	t.Run("bodies", func(t *testing.T) {
		big := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "big"}, BinaryData: map[string][]byte{"x": make([]byte, 3<<20)}}
		if _, err := w1.CoreV1().ConfigMaps(ns).Create(ctx, big, metav1.CreateOptions{}); !apierrors.IsRequestEntityTooLargeError(err) {
			t.Errorf("create: %v", err)
		}
		if _, err := w1.CoreV1().ConfigMaps(ns).Patch(ctx, "kube-root-ca.crt", "application/merge-patch+json", bytes.Repeat([]byte(" "), 3<<20+1), metav1.PatchOptions{}); !apierrors.IsRequestEntityTooLargeError(err) {
			t.Errorf("patch: %v", err)
		}
		hc, err := restclient.HTTPClientFor(cluster.as(s, "w1"))
		if err != nil {
			t.Fatal(err)
		}
		// A body of 100 MB that never ends where it should: refused long before it has been sent.
		var sent int64
		body := io.TeeReader(io.LimitReader(zeros{}, 100<<20), counter{&sent})
		resp, err := hc.Post(s.tls.URL+"/api/v1/namespaces/"+ns+"/configmaps", "application/json", body)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusRequestEntityTooLarge || sent > 50<<20 {
			t.Errorf("status %d after %d bytes", resp.StatusCode, sent)
		}
	})

	t.Run("watches", func(t *testing.T) {
		open := func(c *restclient.Config, n int) (stop []func(), last error) {
			t.Helper()
			k := client(t, c)
			for range n {
				w, err := k.CoreV1().RESTClient().Get().Namespace(ns).Resource("configmaps").Param("watch", "true").MaxRetries(0).Watch(ctx)
				if err != nil {
					return stop, err
				}
				stop = append(stop, w.Stop)
			}
			return stop, nil
		}
		mine, err := open(cluster.as(s, "w1"), 21)
		if len(mine) != 20 || !apierrors.IsTooManyRequests(err) || !strings.Contains(err.Error(), `user "w1" has 20 watches open on this server`) {
			t.Errorf("a user got %d watches: %v", len(mine), err)
		}
		if seconds, ok := apierrors.SuggestsClientDelay(err); !ok || seconds != watchRetry {
			t.Errorf("to come back after %d s", seconds)
		}
		others, err := open(cluster.as(s, "w2"), 20)
		if len(others) != 10 || !apierrors.IsTooManyRequests(err) || !strings.Contains(err.Error(), "30 watches are open on this server") {
			t.Errorf("another got %d watches: %v", len(others), err)
		}
		admins, err := open(cluster.as(s, "admin", "system:masters"), 5)
		if err != nil {
			t.Errorf("the administrator got %d: %v", len(admins), err)
		}
		for _, stop := range append(mine, admins...) {
			stop()
		}
		eventually(t, func(context.Context) error { // the server hears of it
			more, err := open(cluster.as(s, "w2"), 1)
			others = append(others, more...)
			return err
		})
		for _, stop := range others {
			stop()
		}
	})

	t.Run("log", func(t *testing.T) {
		want := []string{`level=INFO msg=request verb=create resource=configmaps uri=/api/v1/namespaces/` + ns + `/configmaps`, "status=413", "user=w1", "flowSchema=global-default", "priorityLevel=global-default"}
		eventually(t, func(context.Context) error {
			if log.find(want...) == "" {
				return fmt.Errorf("no line with %q", want)
			}
			return nil
		})
		line := log.find(want...)
		if !regexp.MustCompile(`auditID=[0-9a-f-]{36}`).MatchString(line) || !regexp.MustCompile(`latency=[0-9.]+[mµ]?s `).MatchString(line) || !strings.Contains(line, "userAgent=test") {
			t.Errorf("line %s", line)
		}
		eventually(t, func(context.Context) error {
			if log.find("verb=watch", "user=w1", "flowSchema=global-default", "status=200") == "" {
				return fmt.Errorf("no line of a watch that ended")
			}
			return nil
		})
		if log.find("user=admin", "flowSchema=exempt", "priorityLevel=exempt") == "" {
			t.Error("no line of the administrator")
		}
	})

	t.Run("dumps", func(t *testing.T) {
		for dump, want := range map[string]string{"dump_priority_levels": "workload-low", "dump_queues": "PendingRequests", "dump_requests": "FlowSchemaName"} {
			if code, body := get(t, cluster.as(s, "admin", "system:masters"), "/debug/api_priority_and_fairness/"+dump); code != http.StatusOK || !strings.Contains(body, want) {
				t.Errorf("%s: %d %.300s", dump, code, body)
			}
		}
		if list, err := k.FlowcontrolV1().FlowSchemas().List(ctx, metav1.ListOptions{}); err != nil || len(list.Items) < len(bootstrap.MandatoryFlowSchemas)+len(bootstrap.SuggestedFlowSchemas) {
			t.Errorf("%d flow schemas, %v", len(list.Items), err)
		}
		if list, err := k.FlowcontrolV1().PriorityLevelConfigurations().List(ctx, metav1.ListOptions{}); err != nil || len(list.Items) < len(bootstrap.MandatoryPriorityLevelConfigurations)+len(bootstrap.SuggestedPriorityLevelConfigurations) {
			t.Errorf("%d priority levels, %v", len(list.Items), err)
		}
	})
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = ' '
	}
	return len(b), nil
}

type counter struct{ n *int64 }

func (c counter) Write(b []byte) (int, error) {
	*c.n += int64(len(b))
	return len(b), nil
}

// What the policy names is recorded, in a file and at a webhook, with who did it for whom; nothing else is.
func TestAudit(t *testing.T) {
	ctx := t.Context()
	var mu sync.Mutex
	var sent []auditv1.Event
	h := newHook(t, func(body []byte) any {
		var list auditv1.EventList
		_ = json.Unmarshal(body, &list)
		mu.Lock()
		defer mu.Unlock()
		sent = append(sent, list.Items...)
		return map[string]any{}
	})
	dir := t.TempDir()
	path := filepath.Join(dir, "new", "audit.log")
	policy := file(t, "policy.yaml", `
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  users: ["system:apiserver"]
- level: RequestResponse
  verbs: [create]
  resources: [{group: "", resources: [configmaps]}]
- level: Metadata
  resources: [{group: "", resources: [secrets]}]
- level: None
`)
	s := another(t, func(c *Config) { c.Access.Audit = access.Audit{Policy: policy, Log: path, Webhook: h.kubeconfig(t)} })
	cfg := cluster.as(s, "admin", "system:masters")
	k := client(t, cfg)
	ns := namespace(t, k)
	if _, err := k.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "c"}, Data: map[string]string{"visible": "yes"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	cfg.Impersonate = restclient.ImpersonationConfig{UserName: "somebody"}
	if _, err := client(t, cfg).CoreV1().Secrets(ns).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}, StringData: map[string]string{"hidden": "hunter2"}}, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
		t.Fatal(err)
	}
	check := func(where string, events []auditv1.Event) error {
		if len(events) != 2 {
			return fmt.Errorf("%s: %d events", where, len(events))
		}
		for _, e := range events {
			switch {
			case e.AuditID == "" || e.Stage != auditv1.StageResponseComplete || e.User.Username != "admin":
				t.Errorf("%s: %+v", where, e)
			case e.ObjectRef.Resource == "configmaps" && (e.Level != auditv1.LevelRequestResponse || !strings.Contains(string(e.RequestObject.Raw), "visible") || e.ResponseStatus.Code != 201):
				t.Errorf("%s: %+v", where, e)
			case e.ObjectRef.Resource == "secrets" && (e.Level != auditv1.LevelMetadata || e.RequestObject != nil || e.ImpersonatedUser == nil || e.ImpersonatedUser.Username != "somebody" || e.ResponseStatus.Code != 403):
				t.Errorf("%s: %+v", where, e)
			}
		}
		return nil
	}
	eventually(t, func(context.Context) error {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if strings.Contains(string(b), "hunter2") {
			t.Error("the log has a secret")
		}
		var events []auditv1.Event
		for line := range strings.Lines(string(b)) {
			var e auditv1.Event
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				return err
			}
			events = append(events, e)
		}
		return check("log", events)
	})
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of the log: %v, %v", info.Mode(), err)
	}
	// Stopping sends what is left.
	began := time.Now()
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if err := check("webhook", sent); err != nil {
		t.Errorf("after a stop of %s: %v", time.Since(began), err)
	}
}
