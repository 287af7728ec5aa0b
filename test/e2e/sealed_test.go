package e2e

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/node/client"
)

const (
	hiddenValue = "e2e-value-that-no-disk-may-have"
	openValue   = "e2e-value-that-every-disk-has" // of a ConfigMap: what proves that the search finds something
	sealedCount = 150                             // enough for the leader to be killed in the middle
)

// sealed looks for the value of Secrets on all disks, then rotates the key and kills the leader while it seals what is stored anew.
func (w *world) sealed(t *testing.T) {
	ctx, cancel := timeout(3 * time.Minute)
	defer cancel()
	api := w.on("n4").CoreV1()
	for i := range sealedCount {
		_, err := api.Secrets("default").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("hidden-%d", i)},
			StringData: map[string]string{"password": hiddenValue}}, metav1.CreateOptions{})
		must(t, err)
	}
	_, err := api.ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "open"},
		Data: map[string]string{"x": openValue}}, metav1.CreateOptions{})
	must(t, err)
	leader := get(w.leader("n1"))(t)
	voters := get(w.voters(leader))(t)
	asks := voters[0]
	if asks == leader {
		asks = voters[1]
	}
	for _, v := range voters {
		eventually(t, 20*time.Second, "the ConfigMap reaches the disk of "+v, func() error {
			if len(w.filesWith(t, v, openValue)) == 0 {
				return errors.New("no file has it")
			}
			return nil
		})
	}
	for _, n := range []string{"n1", "n2", "n3", "n4"} {
		if f := w.filesWith(t, n, hiddenValue); len(f) > 0 {
			t.Errorf("the Secret is in clear on %s: %v", n, f)
		}
		if has := exists(filepath.Join(w.node(n).StateDir(), "identity", "keyring")); has != w.holdsReplica(t, n) {
			t.Errorf("%s has a key ring: %v; it holds a replica: %v", n, has, !has)
		}
	}
	if w.holdsReplica(t, "n4") || len(w.filesWith(t, "n4", openValue)) > 0 {
		t.Error("n4 holds data of the store: it was to be the node without")
	}

	before := get(w.control(asks).Keys(ctx))(t)
	// The certificate of a node without a replica gets no key, and nobody takes one from it; it may ask for ids.
	for body, want := range map[string]int{
		`{"version":1}`: http.StatusOK,
		`{"version":1,"want":"` + before.Primary + `"}`: http.StatusForbidden,
		`{"version":1,"ring":"e30="}`:                   http.StatusForbidden,
	} {
		code, answer := w.askRing(t, "n4", leader, body)
		if code != want || strings.Contains(answer, "secret") {
			t.Errorf("n4 asks %s: %d %s, want %d", body, code, answer, want)
		}
	}
	if code, answer := w.askRing(t, asks, leader, `{"version":1,"want":"`+before.Primary+`"}`); code != http.StatusOK || !strings.Contains(answer, `"ring":`) {
		t.Errorf("a replica asks for the key: %d", code)
	}
	asked := get(w.control(asks).RotateKeys(ctx, client.RotateRequest{}))(t)
	eventually(t, 20*time.Second, "the new key seals, and the leader is at work", func() error {
		k, err := w.control(asks).Keys(ctx)
		if err == nil && (k.Primary == before.Primary || k.Rotation == nil) {
			err = fmt.Errorf("%+v", k)
		}
		return err
	})
	must(t, w.node(leader).KillDaemon(background))
	w.hangUp(leader)
	eventually(t, 30*time.Second, "another leader seals the rest", func() error {
		k, err := w.control(asks).Keys(ctx)
		if err == nil && (k.Rotation == nil || k.Rotation.ID != asked.ID || !strings.Contains(k.Rotation.Waits, leader)) {
			err = fmt.Errorf("the rotation is %+v", k.Rotation)
		}
		return err
	})
	w.readAll(t, asks)
	w.powerOn(t, leader, asks)
	eventually(t, 30*time.Second, "all replicas seal with the new key", func() error {
		k, err := w.control(leader).Keys(ctx)
		for _, r := range k.Replicas {
			if r.Primary != k.Primary || r.Primary == before.Primary || r.Error != "" {
				err = errors.Join(err, fmt.Errorf("%+v", r))
			}
		}
		return err
	})
	for _, n := range []string{leader, asks, "n4"} {
		w.readAll(t, n)
	}
	for _, n := range voters {
		if f := w.filesWith(t, n, hiddenValue); len(f) > 0 {
			t.Errorf("after the rotation the Secret is in clear on %s: %v", n, f)
		}
	}
	must(t, api.Secrets("default").DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
	must(t, api.ConfigMaps("default").Delete(ctx, "open", metav1.DeleteOptions{}))
}

// askRing asks a node for keys as another node, with its certificate.
func (w *world) askRing(t testing.TB, as, node, body string) (int, string) {
	t.Helper()
	dir := filepath.Join(w.node(as).StateDir(), "identity")
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "node.crt"), filepath.Join(dir, "node.key"))
	must(t, err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(get(os.ReadFile(filepath.Join(dir, "ca.crt")))(t))
	tr := &http.Transport{DialContext: w.lab.DialContext, TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: node, Certificates: []tls.Certificate{cert}}}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Post(fmt.Sprintf("https://%s:10250/skein/v1/keyring", w.node(node).IP()), "application/json", strings.NewReader(body))
	must(t, err)
	defer resp.Body.Close()
	return resp.StatusCode, string(get(io.ReadAll(resp.Body))(t))
}

// readAll reads every Secret through a node.
func (w *world) readAll(t testing.TB, node string) {
	t.Helper()
	eventually(t, 15*time.Second, "all Secrets are readable through "+node, func() error {
		ctx, cancel := timeout(5 * time.Second)
		defer cancel()
		l, err := w.on(node).CoreV1().Secrets("default").List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		n := 0
		for _, s := range l.Items {
			if string(s.Data["password"]) == hiddenValue {
				n++
			}
		}
		if n != sealedCount {
			return fmt.Errorf("%d of %d", n, sealedCount)
		}
		return nil
	})
}

func (w *world) holdsReplica(t testing.TB, node string) bool {
	t.Helper()
	ctx, cancel := timeout(5 * time.Second)
	defer cancel()
	s := get(w.control(node).Status(ctx))(t)
	return slices.ContainsFunc(s.Shards, func(s client.Shard) bool { return s.Role != "none" })
}

// filesWith are the files below a node's state directory that contain a text. What containerd keeps is its own.
func (w *world) filesWith(t testing.TB, node, text string) (found []string) {
	t.Helper()
	root := w.node(node).StateDir()
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // gone in the meantime
			return nil
		}
		if err != nil {
			return err
		}
		if d.IsDir() && path == filepath.Join(root, "containerd") {
			return filepath.SkipDir
		}
		if !d.Type().IsRegular() {
			return nil
		}
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if bytes.Contains(b, []byte(text)) {
			found = append(found, path)
		}
		return err
	}))
	return found
}
