package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/connrotation"

	"skein.io/skein/test/cluster"
)

const preciousYAML = `apiVersion: v1
kind: Secret
metadata: {name: precious}
stringData: {word: sesame}
---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: things.demo.test}
spec:
  group: demo.test
  scope: Namespaced
  names: {plural: things, singular: thing, kind: Thing}
  versions: [{name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: skein.local/web:1
        imagePullPolicy: IfNotPresent
        env: [{name: WORD, valueFrom: {secretKeyRef: {name: precious, key: word}}}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`

// TestDisaster loses a majority for good, and then everything: one survivor goes on with what it has, and a backup becomes a new cluster.
func TestDisaster(t *testing.T) {
	w := &world{lab: cluster.ForTest(t, 4, cluster.Config{}), conns: map[string]*connrotation.Dialer{}, kubes: map[string]*kubernetes.Clientset{}}
	defer func() {
		if t.Failed() {
			w.dump(t)
		}
	}()
	files := filepath.Join(w.lab.Dir(), "backups")
	w.begin(t, "--backup-dir="+files, "--backup-schedule=@every 2s", "--backup-keep=2")
	w.apply(t, "n1", preciousYAML)
	eventually(t, 20*time.Second, "the new kind is served", func() error {
		_, err := w.cliIn("n1", "apiVersion: demo.test/v1\nkind: Thing\nmetadata: {name: one}\nspec: {size: 3}\n", "apply", "-f", "-")
		return err
	})
	w.awaitPods(t, "n1", "app=web", 2, 40*time.Second)
	token := w.serviceToken(t, "n1")
	load := w.load(t, "n1")
	w.scheduled(t, files)
	file := filepath.Join(w.lab.Dir(), "all.skb")
	pass := filepath.Join(w.lab.Dir(), "pass")
	must(t, os.WriteFile(pass, []byte("open sesame\n"), 0o600))
	before := load.done.Load()
	w.do(t, "n2", "backup", file, "--passphrase-file", pass)
	if out := w.do(t, "n2", "backup", "verify", file); !strings.Contains(out, "sealed with a passphrase") || !strings.Contains(out, "every checksum is right") {
		t.Errorf("verify says:\n%s", out)
	}
	t.Logf("%d writes during the backup", load.done.Load()-before)
	refused(t, errOf(w.cli("n2", "backup", file)), "exists already", "--force")
	w.badBackups(t, file)
	kept := load.done.Load()
	t.Run("recover", func(t *testing.T) { w.majorityLost(t, load) })
	if !t.Failed() {
		t.Run("restore", func(t *testing.T) { w.allLost(t, file, pass, token, kept) })
	}
}

// begin forms a cluster of three voters with the test images.
func (w *world) begin(t *testing.T, flags ...string) {
	w.start(t, "n1", "", flags...)
	eventually(t, 30*time.Second, "the first node prints its join line", func() error { return w.readToken("n1") })
	w.fetchAdmin(t, "n1")
	w.start(t, "n2", "n1", flags...)
	w.start(t, "n3", "n1", flags...)
	for _, n := range []string{"n1", "n2", "n3"} {
		w.awaitReady(t, n, "n1", 40*time.Second)
		w.loadImages(t, n)
	}
	w.votersAre(t, "n1", "n1", "n2", "n3")
}

func (w *world) readToken(node string) error {
	log, err := os.ReadFile(w.node(node).LogFile())
	if err != nil {
		return err
	}
	m := joinLine.FindAllSubmatch(log, -1)
	if m == nil {
		return fmt.Errorf("no join line in %q", log)
	}
	w.token = string(m[len(m)-1][2])
	return nil
}

func (w *world) votersAre(t testing.TB, asks string, want ...string) {
	t.Helper()
	eventually(t, 40*time.Second, fmt.Sprintf("voters %v", want), func() error {
		v, err := w.voters(asks)
		if err == nil && !slices.Equal(v, want) {
			err = fmt.Errorf("voters are %v", v)
		}
		return err
	})
}

// serviceToken is a ServiceAccount's token.
func (w *world) serviceToken(t testing.TB, node string) string {
	t.Helper()
	ctx, cancel := timeout(10 * time.Second)
	defer cancel()
	r := get(w.on(node).CoreV1().ServiceAccounts("default").CreateToken(ctx, "default", &authv1.TokenRequest{}, metav1.CreateOptions{}))(t)
	return r.Status.Token
}

// writes is a ConfigMap that is patched all the time; done is the last number that was acknowledged.
type writes struct {
	done atomic.Int64
	stop func()
}

func (w *world) load(t testing.TB, node string) *writes {
	t.Helper()
	w.apply(t, node, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: load}\n")
	ctx, cancel := context.WithCancel(context.Background())
	l := &writes{}
	var wg sync.WaitGroup
	client := w.on(node)
	wg.Go(func() {
		for i := int64(1); ctx.Err() == nil; i++ {
			patch := fmt.Sprintf(`{"data":{"n":"%d"}}`, i)
			if _, err := client.CoreV1().ConfigMaps("default").Patch(ctx, "load", types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err == nil {
				l.done.Store(i)
			} else if ctx.Err() == nil {
				time.Sleep(20 * time.Millisecond)
			}
		}
	})
	l.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(l.stop)
	return l
}

// loaded is the number that the ConfigMap has.
func (w *world) loaded(t testing.TB, node string) (n int64) {
	t.Helper()
	ctx, cancel := timeout(5 * time.Second)
	defer cancel()
	c := get(w.on(node).CoreV1().ConfigMaps("default").Get(ctx, "load", metav1.GetOptions{}))(t)
	if _, err := fmt.Sscan(c.Data["n"], &n); err != nil {
		t.Fatalf("load is %q: %v", c.Data["n"], err)
	}
	return n
}

// scheduled waits until the schedule has made and deleted files.
func (w *world) scheduled(t *testing.T, dir string) {
	must(t, os.WriteFile(filepath.Join(dir, "somebody's.skb"), []byte("x"), 0o600))
	first := ""
	eventually(t, 20*time.Second, "the schedule makes backups and deletes old ones", func() error {
		names, err := filepath.Glob(filepath.Join(dir, "skein-*.skb"))
		if err != nil || len(names) == 0 {
			return fmt.Errorf("files %v, %w", names, err)
		}
		if first == "" {
			first = names[0]
		}
		if exists(first) || len(names) > 2 {
			return fmt.Errorf("files %v", names)
		}
		return nil
	})
	if !exists(filepath.Join(dir, "somebody's.skb")) {
		t.Error("the retention deleted a file that is not its own")
	}
	ctx, cancel := timeout(5 * time.Second)
	defer cancel()
	s := get(w.control("n2").Status(ctx))(t)
	if s.Backup == nil || s.Backup.LastError != "" || s.Backup.LastSuccess.IsZero() {
		t.Errorf("the status says %+v", s.Backup)
	}
}

// badBackups are refused by place.
func (w *world) badBackups(t *testing.T, file string) {
	whole := get(os.ReadFile(file))(t)
	bad := filepath.Join(w.lab.Dir(), "bad.skb")
	must(t, os.WriteFile(bad, whole[:len(whole)/2], 0o600))
	refused(t, errOf(w.cli("n4", "restore", bad, "--passphrase-file", filepath.Join(w.lab.Dir(), "pass"))), "bad backup", "at byte", "missing")
	flipped := slices.Clone(whole)
	flipped[len(flipped)/2] ^= 1
	must(t, os.WriteFile(bad, flipped, 0o600))
	refused(t, errOf(w.cli("n4", "restore", bad, "--passphrase-file", filepath.Join(w.lab.Dir(), "pass"))), "shard", "checksum")
	refused(t, errOf(w.cli("n4", "restore", file)), "passphrase")
	if exists(filepath.Join(w.node("n4").StateDir(), "raft")) {
		t.Error("a refused restore left state behind")
	}
	refused(t, errOf(w.cli("n1", "restore", file)), "another skein uses")
}

// majorityLost kills two of three voters for good.
func (w *world) majorityLost(t *testing.T, load *writes) {
	refused(t, errOf(w.cli("n3", "recover", "--yes")), "stop this node's daemon first")
	must(t, w.node("n3").KillDaemon(background))
	refused(t, errOf(w.cli("n3", "recover", "--yes")), "a majority of the voters is alive", "3 of 3 voters answer")
	must(t, w.node("n3").Start(background, nil))
	load.stop()
	last := load.done.Load()
	eventually(t, 30*time.Second, "n3 has caught up", func() error {
		a, b := w.shards("n1"), w.shards("n3")
		for i := range a {
			if len(b) != len(a) || b[i].Leader == "" || b[i].Applied < a[i].Applied {
				return fmt.Errorf("n1 has %+v, n3 %+v", a, b)
			}
		}
		return nil
	})
	for _, n := range []string{"n1", "n2"} {
		must(t, w.node(n).Kill(background))
		w.hangUp(n)
	}
	eventually(t, 30*time.Second, "n3 sees that it is alone", func() error {
		if err := w.healthy("n3"); err == nil || !strings.Contains(err.Error(), "no leader heard of") {
			return fmt.Errorf("its health is %v", err)
		}
		return nil
	})
	must(t, w.node("n3").KillDaemon(background))
	w.hangUp("n3")
	began := time.Now()
	out := w.do(t, "n3", "recover", "--yes")
	t.Logf("recovered in %s:\n%s", time.Since(began).Round(time.Millisecond), out)
	for _, x := range []string{"1 of 3 (n3)", "believed dead: n1, n2", "May be lost", "ago)", "generation 1"} {
		if !strings.Contains(out, x) {
			t.Errorf("the report does not say %q", x)
		}
	}
	must(t, w.node("n3").Start(background, nil))
	w.votersAre(t, "n3", "n3")
	eventually(t, 30*time.Second, "the API answers", func() error { return errOf(w.cli("n3", "get", "secret", "precious")) })
	if n := w.loaded(t, "n3"); n < last || n > last+1 { // the answer to the very last may have been cut off
		t.Errorf("the last write was %d, found is %d", last, n)
	}
	w.apply(t, "n3", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: after}\n")

	// A dead one comes back with its old data.
	must(t, w.node("n1").Start(background, nil))
	eventually(t, 40*time.Second, "n1 joins the new generation and gets a replica", func() error {
		ctx, cancel := timeout(3 * time.Second)
		defer cancel()
		s, err := w.control("n1").Status(ctx)
		if err != nil {
			return err
		}
		for _, x := range s.Shards {
			if x.Leader != "n3" || x.Role == "none" || x.Role == "starting" {
				return fmt.Errorf("shard %+v", x)
			}
		}
		return nil
	})
	w.awaitReady(t, "n1", "n3", 40*time.Second)
	eventually(t, 20*time.Second, "n1 serves what was written after the recovery", func() error { return errOf(w.cli("n1", "get", "configmap", "after")) })
}

// allLost destroys every node and restores the backup on n4.
func (w *world) allLost(t *testing.T, file, pass, token string, kept int64) {
	for _, n := range []string{"n1", "n3"} {
		must(t, w.node(n).Kill(background))
		w.hangUp(n)
	}
	must(t, w.node("n2").Wipe())
	began := time.Now()
	out := w.do(t, "n4", "restore", file, "--passphrase-file", pass)
	t.Logf("restored in %s:\n%s", time.Since(began).Round(time.Millisecond), out)
	refused(t, errOf(w.cli("n4", "restore", file, "--passphrase-file", pass)), "holds the state of node n4", "identity, raft")
	w.start(t, "n4", "")
	w.awaitReady(t, "n4", "n4", 40*time.Second) // with the old administrator's certificate
	w.loadImages(t, "n4")
	eventually(t, 20*time.Second, "a join line", func() error { return w.readToken("n4") })
	for _, args := range [][]string{{"get", "secret", "precious", "-o", "jsonpath={.data.word}"}, {"get", "things.demo.test", "one", "-o", "jsonpath={.spec.size}"}} {
		eventually(t, 20*time.Second, strings.Join(args, " "), func() error {
			out, err := w.cli("n4", args...)
			if err == nil && out != "c2VzYW1l" && out != "3" {
				err = fmt.Errorf("it is %q", out)
			}
			return err
		})
	}
	if n := w.loaded(t, "n4"); n > kept || n < 1 {
		t.Errorf("the load was at %d when the backup ended, restored is %d", kept, n)
	}
	if err := w.exists("n4", "after"); err == nil {
		t.Error("what was written after the backup is there")
	}
	ctx, cancel := timeout(5 * time.Second)
	defer cancel()
	review := get(w.on("n4").AuthenticationV1().TokenReviews().Create(ctx, &authv1.TokenReview{Spec: authv1.TokenReviewSpec{Token: token}}, metav1.CreateOptions{}))(t)
	if !review.Status.Authenticated {
		t.Errorf("a ServiceAccount's token of the old cluster: %+v", review.Status)
	}
	_, took := w.awaitPods(t, "n4", "app=web", 2, 60*time.Second)
	t.Logf("the workload runs again %s later, %s after the disaster", took, time.Since(began))

	must(t, w.node("n2").Start(background, nil, skein(), "join", w.node("n4").IP().String(), "--token", w.token))
	w.awaitReady(t, "n2", "n4", 40*time.Second)
	if err := w.nodeReady("n1", "n4", false); err != nil {
		t.Errorf("the old node n1: %v", err)
	}
	eventually(t, 20*time.Second, "n2 serves", func() error { return errOf(w.cli("n2", "get", "secret", "precious")) })
}

func (w *world) exists(asks, configMap string) error {
	ctx, cancel := timeout(5 * time.Second)
	defer cancel()
	_, err := w.on(asks).CoreV1().ConfigMaps("default").Get(ctx, configMap, metav1.GetOptions{})
	return err
}
