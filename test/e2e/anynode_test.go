package e2e

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"skein.io/skein/node/client"
)

const (
	// streamLimit is how long streams through a node may take to end, and requests to work again, when the replica dies that they went to.
	streamLimit = 5 * time.Second
	// pastLimit is how long a read may take on a node that has just been cut off: two seconds, and a busy machine.
	pastLimit = 4 * time.Second
)

// inside asks the API of a node over its own loopback, as what runs on it does, with an administrator's certificate.
type inside struct {
	*http.Client
	t *testing.T
}

func (w *world) inside(t *testing.T, node string) inside {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: get(rest.TLSConfigFor(w.admin))(t), DialContext: w.node(node).DialContext}
	return inside{&http.Client{Transport: tr, Timeout: 20 * time.Second}, t}
}

// answer is what came of a request.
type answer struct {
	code    int
	body    string
	age     int // X-Skein-Age; -1 for the present
	warning string
	retry   string
	took    time.Duration
}

func (i inside) do(method, path, body string, header ...string) answer {
	i.t.Helper()
	i.CloseIdleConnections()
	return i.again(method, path, body, header...)
}

// again is do over a connection that is open, if there is one.
func (i inside) again(method, path, body string, header ...string) answer {
	i.t.Helper()
	r := get(http.NewRequest(method, "https://127.0.0.1:6443"+path, strings.NewReader(body)))(i.t)
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for k := 0; k+1 < len(header); k += 2 {
		r.Header.Set(header[k], header[k+1])
	}
	began := time.Now()
	resp, err := i.Do(r)
	if err != nil {
		return answer{body: err.Error(), took: time.Since(began), age: -1}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		b = append(b, err.Error()...)
	}
	a := answer{code: resp.StatusCode, body: string(b), age: -1, warning: resp.Header.Get("Warning"), retry: resp.Header.Get("Retry-After"), took: time.Since(began)}
	if v, err := strconv.Atoi(resp.Header.Get(client.AgeHeader)); err == nil {
		a.age = v
	}
	return a
}

// past reads what a cut-off node knows; the first answer may take as long as it takes to be sure that it is cut off.
func (i inside) past(path string, words ...string) answer {
	i.t.Helper()
	a := i.do("GET", path, "")
	if a.code != 200 || a.age < 0 || !strings.HasPrefix(a.warning, `299 - "last known state, `) {
		i.t.Errorf("%s: %+v", path, a)
	}
	for _, x := range words {
		if !strings.Contains(a.body, x) {
			i.t.Errorf("%s: no %q in %s", path, x, a.body)
		}
	}
	if a.took > pastLimit {
		i.t.Errorf("%s was answered after %s", path, a.took)
	}
	return a
}

// refusedEarly checks writes and watches on a cut-off node.
func (i inside) refusedEarly() {
	i.t.Helper()
	const maps = "/api/v1/namespaces/default/configmaps"
	for what, a := range map[string]answer{
		"a write":     i.do("POST", maps, `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"cut-off"}}`),
		"a patch":     i.do("PATCH", maps+"/kube-root-ca.crt", `{}`, "Content-Type", "application/merge-patch+json"),
		"a deletion":  i.do("DELETE", maps+"/kube-root-ca.crt", ""),
		"a watch":     i.do("GET", maps+"?watch=1", ""),
		"the present": i.do("GET", maps, "", client.MaxAgeHeader, "0"),
	} {
		var s metav1.Status
		if err := json.Unmarshal([]byte(a.body), &s); err != nil || a.code != 503 || s.Code != 503 || a.retry != "1" || a.age != -1 || a.took > time.Second || len(s.Message) < 40 {
			i.t.Errorf("%s on a cut-off node: %+v", what, a)
		}
		i.t.Logf("%s: refused after %s: %s", what, a.took.Round(time.Millisecond), s.Message)
	}
}

// cutOff takes the cable out of a node without a replica, then cuts a replica off from the others: both show what they know, and how old
// that is, and nobody else is misled.
func (w *world) cutOff(t *testing.T) {
	w.apply(t, "n1", `apiVersion: v1
kind: ConfigMap
metadata: {name: known}
data: {k: "1"}
---
apiVersion: v1
kind: Pod
metadata: {name: stays, labels: {app: stays}}
spec:
  nodeName: n4
  terminationGracePeriodSeconds: 0
  tolerations: [{operator: Exists}]
  containers: [{name: c, image: "skein.local/tools:1", imagePullPolicy: IfNotPresent, args: [sleep], envFrom: [{configMapRef: {name: known}}]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: robot}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects: [{kind: ServiceAccount, name: default, namespace: default}]
`)
	token := get(w.on("n1").CoreV1().ServiceAccounts("default").CreateToken(background, "default", &authv1.TokenRequest{}, metav1.CreateOptions{}))(t).Status.Token
	w.awaitPods(t, "n1", "app=stays", 1, 30*time.Second)
	for _, c := range []struct {
		name, node string
		replica    bool
	}{{"without a replica", "n4", false}, {"with one", "n3", true}} {
		t.Run(c.name, func(t *testing.T) {
			i := w.inside(t, c.node)
			fresh := func() error {
				if a := i.do("GET", "/api/v1/nodes", ""); a.code != 200 || a.age != -1 || a.warning != "" {
					return fmt.Errorf("%+v", a)
				}
				return nil
			}
			eventually(t, 20*time.Second, "the present", fresh)
			if c.replica {
				must(t, w.lab.Partition(background, []string{c.node}, w.others(c.node)))
			} else {
				must(t, w.node(c.node).Link(background, false))
			}
			cut := time.Now()
			heal := sync.OnceFunc(func() { must(t, w.lab.Heal(background)); w.hangUp(c.node) })
			defer heal()
			if a := i.again("GET", "/api/v1/nodes", ""); a.took > pastLimit {
				t.Errorf("over a connection from before: %+v", a)
			} else {
				t.Logf("over a connection from before: %s, age %d, after %s", cmp.Or(strconv.Itoa(a.code), a.body), a.age, a.took.Round(time.Millisecond))
			}
			a := i.past("/api/v1/namespaces/default/pods", "stays")
			t.Logf("cut off: the first read was answered after %s: %s", a.took.Round(time.Millisecond), a.warning)
			i.past("/api/v1/nodes/n1", `"kind":"Node"`)
			i.past("/api/v1/namespaces/default/configmaps/known", `"k":"`)
			i.past("/apis/discovery.k8s.io/v1/endpointslices", "EndpointSliceList")
			if c.replica { // it has everything
				i.past("/apis/rbac.authorization.k8s.io/v1/clusterroles/view", `"rules"`)
				i.past("/api/v1/namespaces/default/secrets", "SecretList")
				if a := i.do("GET", "/api/v1/namespaces/default/pods/nope", ""); a.code != 404 || a.age < 0 {
					t.Errorf("a pod that is not: %+v", a)
				}
			} else if a := i.do("GET", "/api/v1/namespaces/default/pods/nope", ""); a.code != 503 {
				t.Errorf("a pod that may be elsewhere: %+v", a)
			}
			i.refusedEarly()
			if a := i.do("GET", "/api/v1/nodes", "", client.MaxAgeHeader, "3600"); a.code != 200 || a.age < 0 {
				t.Errorf("a read that takes anything of the last hour: %+v", a)
			}
			old := i.past("/api/v1/nodes")
			if real := time.Since(cut); time.Duration(old.age)*time.Second < real-1500*time.Millisecond || time.Duration(old.age)*time.Second > real+6*time.Second {
				t.Errorf("cut off since %s, and the state is said to be %d s old", real, old.age)
			}
			env := w.lab.Dir() // no kubeconfig of the user's: root asks the node itself
			out, err := w.runAs(c.node, env, skein(), "get", "pods", "-l", "app=stays", "--max-age=1h")
			if err != nil || !regexp.MustCompile(`(?s)Warning: last known state, \d+s old: .*stays +1/1 +Running`).MatchString(out) {
				t.Errorf("skein get: %v\n%s", err, out)
			}
			out, err = w.runAs(c.node, env, skein(), "get", "nodes", "--max-age=1s")
			if err == nil || !strings.Contains(out, "s old, and at most 1s was asked for") {
				t.Errorf("skein get --max-age=1s: %v\n%s", err, out)
			}
			nobody := inside{&http.Client{Transport: i.withoutCertificate(), Timeout: 20 * time.Second}, t}
			if a := nobody.do("GET", "/api/v1/nodes", ""); a.code == 200 {
				t.Errorf("nobody reads: %+v", a)
			}
			if c.replica { // it can check tokens and roles
				if a := nobody.do("GET", "/api/v1/namespaces/default/pods", "", "Authorization", "Bearer "+token); a.code != 200 || a.age < 0 {
					t.Errorf("a ServiceAccount reads what it may: %+v", a)
				}
				if a := nobody.do("GET", "/api/v1/namespaces/default/secrets", "", "Authorization", "Bearer "+token); a.code != 403 {
					t.Errorf("a ServiceAccount reads what it may not: %+v", a)
				}
			}
			// The others go on, and this node follows as soon as it can.
			took := eventually(t, writeLimit, "a write elsewhere", func() error {
				ctx, cancel := timeout(2 * time.Second)
				defer cancel()
				_, err := w.on("n2").CoreV1().ConfigMaps("default").Update(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "known"}, Data: map[string]string{"k": c.node}}, metav1.UpdateOptions{})
				return err
			})
			t.Logf("the others wrote after %s", took)
			i.past("/api/v1/namespaces/default/configmaps/known", `"k":"`)
			heal()
			t.Logf("the present again %s after the cut was healed", eventually(t, 20*time.Second, "the present", fresh))
			if a := i.do("GET", "/api/v1/namespaces/default/configmaps/known", ""); !strings.Contains(a.body, `"k":"`+c.node) {
				t.Errorf("%+v", a)
			}
			must(t, errOf(w.cli("n1", "get", "cm", "known")))
		})
	}
	t.Run("a replica that others reach", func(t *testing.T) {
		// n3 hears no leader; n4 reaches all three, and must not be given what n3 remembers.
		must(t, w.lab.Partition(background, []string{"n3"}, []string{"n1", "n2"}))
		defer func() { must(t, w.lab.Heal(background)); w.hangUp("n3") }()
		w.inside(t, "n3").past("/api/v1/namespaces/default/pods", "stays")
		i := w.inside(t, "n4")
		eventually(t, 10*time.Second, "n4 leaves n3 alone", func() error {
			for range 20 {
				if a := i.do("GET", "/api/v1/nodes", ""); a.code != 200 || a.age != -1 {
					return fmt.Errorf("%+v", a)
				}
			}
			return nil
		})
	})
	w.do(t, "n1", "delete", "pod/stays", "cm/known", "rolebinding/robot", "--wait=false")
}

// withoutCertificate trusts any server and proves nothing.
func (i inside) withoutCertificate() http.RoundTripper {
	tr := i.Transport.(*http.Transport).Clone()
	tr.TLSClientConfig.Certificates, tr.TLSClientConfig.GetClientCertificate = nil, nil
	return tr
}

// runAs runs a program in a node as root who has no kubeconfig, and gives both streams.
func (w *world) runAs(node, home string, argv ...string) (string, error) {
	ctx, cancel := timeout(20 * time.Second)
	defer cancel()
	cmd, err := w.node(node).Command(ctx, argv...)
	if err != nil {
		return "", err
	}
	cmd.Env = append(cmd.Env, "HOME="+home, "KUBECONFIG=")
	b, err := cmd.CombinedOutput()
	return string(b), err
}

// stream is a client that holds a connection through a node.
type stream struct {
	name  string
	cmd   *exec.Cmd
	ended chan struct{}
	at    time.Time

	mu  sync.Mutex // guards out
	out int        // bytes that it has said
}

// Write implements io.Writer.
func (s *stream) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out += len(b)
	return len(b), nil
}

func (s *stream) said() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out
}

// replicaOf tells where a node without replica sends most of its connections.
func (w *world) replicaOf(t *testing.T, node string) string {
	t.Helper()
	ctx, cancel := timeout(5 * time.Second)
	defer cancel()
	out := get(w.node(node).Exec(ctx, "ss", "-tnH", "state", "established", "( dport = :6443 )"))(t)
	best, most := "", 0
	for _, n := range w.others(node) {
		if k := strings.Count(out, w.node(n).IP().String()+":6443"); k > most {
			best, most = n, k
		}
	}
	if best == "" {
		t.Fatalf("no connections to replicas in\n%s", out)
	}
	return best
}

// streams kills the replica that a node without one sends everything to: all streams end at once instead of hanging, and whoever comes
// back finds another replica.
func (w *world) streams(t *testing.T) {
	const node = "n4"
	s := w.newSession(t, node, "streams", nil)
	s.run(t, []check{ // On this node, which is not the one that will be killed.
		ok("sed 's/^spec:/&\\n  nodeSelector: {kubernetes.io\\/hostname: "+node+"}/' box.yaml | k create -f - && k wait --for=condition=Ready pod/box --timeout=40s", "condition met")})
	var all []*stream
	open := func(name string, args ...string) {
		x := &stream{name: name, ended: make(chan struct{})}
		x.cmd = get(w.node(node).Command(background, append([]string{bin + "/kubectl"}, args...)...))(t)
		x.cmd.Env, x.cmd.Dir = s.env, s.dir
		x.cmd.Stdout, x.cmd.Stderr = x, x
		if name == "exec" || name == "attach" {
			r, wr, err := os.Pipe() // stays open: the client does not end by itself
			must(t, err)
			x.cmd.Stdin = r
			t.Cleanup(func() { wr.Close(); r.Close() })
		}
		x.cmd.WaitDelay = time.Second
		must(t, x.cmd.Start())
		go func() {
			_ = x.cmd.Wait()
			x.at = time.Now()
			close(x.ended)
		}()
		t.Cleanup(func() { _ = x.cmd.Process.Kill(); <-x.ended })
		all = append(all, x)
	}
	open("watch", "get", "--raw", "/api/v1/namespaces/streams/pods?watch=1")
	open("logs -f", "logs", "-f", "box", "-c", "lines")
	open("exec", "exec", "-i", "box", "-c", "box", "--", "cat")
	open("attach", "attach", "-i", "box", "-c", "box")
	open("port-forward", "port-forward", "pod/box", "18090:8080")
	tunnel := &http.Client{Transport: &http.Transport{DialContext: w.node(node).DialContext}, Timeout: 3 * time.Second}
	eventually(t, 20*time.Second, "the tunnel works", func() error {
		resp, err := tunnel.Get("http://127.0.0.1:18090/healthz")
		if err == nil {
			resp.Body.Close()
		}
		return err
	})
	time.Sleep(time.Second) // all of them run
	for _, x := range all {
		select {
		case <-x.ended:
			t.Fatalf("%s ended by itself", x.name)
		default:
		}
	}
	victim := w.replicaOf(t, node)
	must(t, w.node(victim).KillDaemon(background))
	died := time.Now()
	w.hangUp(victim)
	i := w.inside(t, node)
	t.Logf("%s, which %s used, was killed; the next read through %s succeeded after %s", victim, node, node, eventually(t, streamLimit, "a read", func() error {
		if a := i.do("GET", "/api/v1/namespaces/streams/pods", ""); a.code != 200 || a.age != -1 {
			return fmt.Errorf("%+v", a)
		}
		return nil
	}))
	took := eventually(t, streamLimit, "a write", func() error {
		a := i.do("POST", "/api/v1/namespaces/streams/configmaps", `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"generateName":"w-"}}`)
		if a.code != 201 {
			return fmt.Errorf("%+v", a)
		}
		return nil
	})
	t.Logf("the next write %s after that", took)
	resp, err := tunnel.Get("http://127.0.0.1:18090/healthz") // a lost tunnel is noticed when it is used
	if err == nil {
		resp.Body.Close()
	}
	// A busy node may have passed some to another replica: those must go on.
	s.run(t, []check{ok("k label pod box after=death", "labeled")})
	ended := 0
	for _, x := range all {
		select {
		case <-x.ended:
			ended++
			t.Logf("%s ended %s after the death", x.name, x.at.Sub(died).Round(time.Millisecond))
		case <-time.After(max(100*time.Millisecond, time.Until(died.Add(streamLimit)))):
			was := x.said()
			s.run(t, []check{ok("k label pod box --overwrite after="+strings.ReplaceAll(x.name, " ", ""), "labeled")})
			time.Sleep(500 * time.Millisecond)
			if moves := x.name == "watch" || x.name == "logs -f"; moves && x.said() == was {
				t.Errorf("%s hangs", x.name)
			}
		}
	}
	if ended == 0 {
		t.Error("no stream ended: none went to the replica that died, so the test shows nothing")
	}
	s.run(t, []check{
		ok("k exec box -c box -- echo hello", "^hello$"),
		ok("k logs box -c lines --tail=1", `\d`),
		ok("timeout 5 kubectl get pod box -w --request-timeout=2s; true", "box +3/3"),
	})
	must(t, w.node(victim).Start(background, nil))
	eventually(t, 40*time.Second, victim+" works", func() error { return w.healthy(victim) })
	s.run(t, []check{ok("k delete pods --all --grace-period=0 --force", "deleted")})
}
