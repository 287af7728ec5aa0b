//go:build storetools

package tools

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// kubectl runs upstream's kubectl as an administrator.
type kubectl struct {
	t    *testing.T
	path string
	args []string
}

func (k kubectl) try(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, k.path, append(args, k.args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("kubectl %q: %w: %s", args, err, errs.String())
	}
	return out.String(), err
}

func (k kubectl) run(stdin string, args ...string) string {
	k.t.Helper()
	out, err := k.try(stdin, args...)
	must(k.t, err)
	return out
}

func pod(name string) string {
	return `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"` + name + `"},"spec":{"containers":[{"name":"c","image":"x"}]}}`
}

// startAPIServer runs a plain kube-apiserver on the store: the system shard's
// endpoints are its etcd, the others' its etcd for what they keep.
func startAPIServer(t *testing.T, s *store) kubectl {
	t.Helper()
	cert, key := s.ca.issue(t, "kube-apiserver", "system:masters")
	port := freePorts(t, 1)
	semi := func(shard int) string { return strings.ReplaceAll(s.endpoints(shard), ",", ";") }
	args := []string{
		"--etcd-servers=" + s.endpoints(0), "--etcd-cafile=" + s.ca.path("ca.crt"), "--etcd-certfile=" + cert, "--etcd-keyfile=" + key,
		"--etcd-servers-overrides=/pods#" + semi(1) + ",/events#" + semi(2) + ",events.k8s.io/events#" + semi(2) + ",coordination.k8s.io/leases#" + semi(2),
		"--bind-address=127.0.0.1", fmt.Sprint("--secure-port=", port), "--advertise-address=192.0.2.10", "--client-ca-file=" + s.ca.path("ca.crt"),
		"--tls-cert-file=" + cert, "--tls-private-key-file=" + key, "--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=" + key,
		"--service-account-signing-key-file=" + key, "--authorization-mode=Node,RBAC", "--service-cluster-ip-range=10.96.0.0/16", "--disable-admission-plugins=ServiceAccount",
	}
	log, err := os.Create(t.TempDir() + "/log")
	must(t, err)
	cmd := exec.Command(tool(t, "kube-apiserver"), args...)
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // killed
		log.Close()
		if b, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("the end of its log:\n%s", b[max(0, len(b)-4000):])
		}
	})
	k := kubectl{t, tool(t, "kubectl"), []string{fmt.Sprint("--server=https://127.0.0.1:", port), "--certificate-authority=" + s.ca.path("ca.crt"), "--client-certificate=" + cert, "--client-key=" + key,
		"--request-timeout=20s"}}
	began := time.Now()
	until(t, "kube-apiserver", 90*time.Second, func() error {
		_, err := k.try("", "get", "--raw=/readyz")
		return err
	})
	t.Logf("kube-apiserver ready after %s", time.Since(began).Round(time.Millisecond))
	return k
}

// leads returns the node that leads a shard.
func (s *store) leads(shard string) (found *node) {
	s.t.Helper()
	until(s.t, "a leader of "+shard, 20*time.Second, func() error {
		for _, n := range s.nodes {
			if n.cmd == nil {
				continue
			}
			out, err := s.ask(n, "/status")
			if err != nil {
				return err
			}
			var status []struct{ Shard, Role string }
			must(s.t, json.Unmarshal([]byte(out), &status))
			for _, x := range status {
				if x.Shard == shard && x.Role == "leader" {
					found = n
					return nil
				}
			}
		}
		return fmt.Errorf("none")
	})
	return found
}

func TestKubeAPIServer(t *testing.T) {
	s := startStore(t)
	k := startAPIServer(t, s)
	if v := k.run("", "get", "--raw=/version"); !strings.Contains(v, `"minor": "36"`) {
		t.Error(v)
	}
	until(t, "namespace default", 30*time.Second, func() error {
		_, err := k.try("", "get", "namespace", "default")
		return err
	})
	k.run("", "create", "configmap", "c", "--from-literal=a=b")
	k.run(pod("first"), "create", "-f", "-")
	k.run(`{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"name":"l"},"spec":{"holderIdentity":"x"}}`, "create", "-f", "-")
	k.run(`{"apiVersion":"v1","kind":"Event","metadata":{"name":"e"},"involvedObject":{"kind":"Pod","namespace":"default","name":"first"},"reason":"Test","type":"Normal"}`, "create", "-f", "-")

	// Each shard keeps its own.
	cert, key := s.ca.issue(t, "admin", "system:masters")
	s.ctl(0, cert, key).want(`/registry/configmaps/default/c\n.*/registry/namespaces/default\n`, "get", "/registry/", "--prefix", "--keys-only")
	s.ctl(1, cert, key).want(`^/registry/pods/default/first\n\n$`, "get", "/registry/pods/", "--prefix", "--keys-only")
	s.ctl(2, cert, key).want(`/registry/events/default/e\n.*/registry/leases/default/l\n`, "get", "/registry/", "--prefix", "--keys-only")

	// A watch goes on over the death of leaders, and nothing acknowledged is lost.
	watch := exec.Command(k.path, append([]string{"get", "pods", "-w", "--no-headers", "-o", "custom-columns=:metadata.name"}, k.args[:4]...)...)
	out, err := watch.StdoutPipe()
	must(t, err)
	must(t, watch.Start())
	seen := make(chan string, 10000)
	go func() {
		defer close(seen)
		for l := bufio.NewScanner(out); l.Scan(); {
			seen <- strings.TrimSpace(l.Text())
		}
	}()
	t.Cleanup(func() {
		_ = watch.Process.Kill() // it may have ended
		_ = watch.Wait()         // killed
	})
	for _, shard := range []string{"pods", "system"} {
		var made []string
		dead := s.leads(shard)
		dead.kill()
		killed := time.Now()
		outage := time.Duration(0)
		for i := range 10 {
			name := fmt.Sprintf("%s-%d", shard, i)
			until(t, "create "+name, 30*time.Second, func() error {
				_, err := k.try(pod(name), "create", "-f", "-")
				if err != nil && strings.Contains(err.Error(), "AlreadyExists") {
					err = nil // an attempt whose answer was lost
				}
				return err
			})
			if outage == 0 {
				outage = time.Since(killed)
			}
			made = append(made, name)
		}
		k.run("", "create", "configmap", "after-"+shard, "--from-literal=a=b")
		t.Logf("leader of %s killed: next pod created after %s", shard, outage.Round(time.Millisecond))
		names := k.run("", "get", "pods", "-o", "name")
		waiting := map[string]bool{}
		for _, n := range made {
			waiting[n] = true
			if !strings.Contains(names, "pod/"+n+"\n") {
				t.Errorf("pod %s is lost", n)
			}
		}
		for len(waiting) > 0 {
			select {
			case n, ok := <-seen:
				if !ok {
					t.Fatalf("the watch ended; it did not tell %v", waiting)
				}
				delete(waiting, n)
			case <-time.After(30 * time.Second):
				t.Fatalf("the watch does not tell %v", waiting)
			}
		}
		s.start(dead)
	}
	k.run("", "delete", "pod", "first", "--wait=true", "--grace-period=0", "--force")
	if got := k.run("", "get", "--raw=/readyz?verbose"); !strings.Contains(got, "[+]etcd ok") {
		t.Error(got)
	}
}
