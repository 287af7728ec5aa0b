package api

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	protobufs "k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"

	"skein.io/skein/consensus/keyring"
	"skein.io/skein/node/api/encrypt"
	"skein.io/skein/node/api/store"
)

// memoryKeys is a ring in memory.
type memoryKeys struct {
	mu    sync.Mutex // guards the rest
	ring  keyring.Ring
	other keyring.Ring // what Fetch finds
	asked []string
}

func (m *memoryKeys) Ring() (keyring.Ring, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ring, nil
}

func (m *memoryKeys) Fetch(_ context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked = append(m.asked, id)
	if !m.other.Has(id) {
		return errors.New("no replica has it")
	}
	var err error
	m.ring, err = m.ring.Merge(m.other)
	return err
}

func (m *memoryKeys) set(t testing.TB, f func(keyring.Ring) (keyring.Ring, error)) keyring.Ring {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	r, err := f(m.ring)
	if err != nil {
		t.Fatal(err)
	}
	m.ring = r
	return r
}

// rotate adds a key and makes it the primary one.
func rotate(t testing.TB) func(keyring.Ring) (keyring.Ring, error) {
	return func(r keyring.Ring) (keyring.Ring, error) {
		k, err := keyring.NewKey(rand.Reader, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if r, err = r.Add(k); err != nil {
			return r, err
		}
		return r.Use(k.ID)
	}
}

// raw is what the store holds of an object, and its revision.
func raw(t testing.TB, key string) ([]byte, int64) {
	t.Helper()
	r, err := cluster.store.KV.Get(t.Context(), key)
	if err != nil || len(r.Kvs) != 1 {
		t.Fatalf("%s: %v, %v", key, r, err)
	}
	return r.Kvs[0].Value, r.Kvs[0].ModRevision
}

const hidden = "a-value-that-nobody-may-find"

func makeSecret(t testing.TB, k kubernetes.Interface, ns, name string) (key string) {
	t.Helper()
	_, err := k.CoreV1().Secrets(ns).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name},
		Data: map[string][]byte{"password": []byte(hidden)}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return "/registry/secrets/" + ns + "/" + name
}

func readSecret(t testing.TB, k kubernetes.Interface, ns, name string) {
	t.Helper()
	s, err := k.CoreV1().Secrets(ns).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil || string(s.Data["password"]) != hidden {
		t.Fatalf("Secret %s/%s: %v, %v", ns, name, s, err)
	}
}

func TestSecretsAreSealed(t *testing.T) {
	k := admin(t)
	other := client(t, cluster.as(cluster.servers[1], "admin", "system:masters"))
	ns := namespace(t, k)
	key := makeSecret(t, k, ns, "s1")
	ring, _ := cluster.keys.Ring()
	first := ring.Primary()
	stored, rev := raw(t, key)
	if !bytes.HasPrefix(stored, []byte(encrypt.Prefix)) || bytes.Contains(stored, []byte(hidden)) || bytes.Contains(stored, []byte("password")) {
		t.Fatalf("stored as %q", stored)
	}
	if id, err := encrypt.KeyOf(stored); err != nil || id != first {
		t.Errorf("sealed by %q, %v, want %q", id, err, first)
	}
	readSecret(t, other, ns, "s1") // another process, with a data key of its own
	// A ConfigMap is not sealed, so that the test above can fail.
	if _, err := k.CoreV1().ConfigMaps(ns).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "c"},
		Data: map[string]string{"x": hidden}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if plain, _ := raw(t, "/registry/configmaps/"+ns+"/c"); !bytes.Contains(plain, []byte(hidden)) {
		t.Errorf("the ConfigMap is stored as %q: grep finds nothing anywhere", plain)
	}

	second := cluster.keys.set(t, rotate(t)).Primary()
	readSecret(t, k, ns, "s1")
	// An update that changes nothing writes nothing but a stale value.
	touch := func() {
		t.Helper()
		s, err := k.CoreV1().Secrets(ns).Get(t.Context(), "s1", metav1.GetOptions{})
		if err == nil {
			_, err = k.CoreV1().Secrets(ns).Update(t.Context(), s, metav1.UpdateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	touch()
	stored, now := raw(t, key)
	if id, _ := encrypt.KeyOf(stored); id != second || now == rev {
		t.Errorf("an update after the rotation left key %q at revision %d, want %q", id, now, second)
	}
	touch()
	if _, again := raw(t, key); again != now {
		t.Error("an update that changes nothing wrote again")
	}

	// What somebody copies to another place in the store does not open there.
	if _, err := cluster.store.KV.Put(t.Context(), "/registry/secrets/"+ns+"/copy", string(stored)); err != nil {
		t.Fatal(err)
	}
	defer cluster.store.KV.Delete(context.WithoutCancel(t.Context()), "/registry/secrets/"+ns+"/copy")
	if _, err := k.CoreV1().Secrets(ns).Get(t.Context(), "copy", metav1.GetOptions{}); err == nil || strings.Contains(err.Error(), hidden) {
		t.Errorf("the copy: %v, want a refusal without the value", err)
	}
}

// plainSecret stores a Secret as a server without encryption did.
func plainSecret(t testing.TB, ns, name string) string {
	t.Helper()
	o := &corev1.Secret{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: "u-1", CreationTimestamp: metav1.Now()},
		Data:       map[string][]byte{"password": []byte(hidden)}, Type: corev1.SecretTypeOpaque}
	b, err := runtime.Encode(protobufs.NewSerializer(scheme.Scheme, scheme.Scheme), o)
	if err != nil {
		t.Fatal(err)
	}
	key := "/registry/secrets/" + ns + "/" + name
	if _, err := cluster.store.KV.Put(t.Context(), key, string(b)); err != nil {
		t.Fatal(err)
	}
	return key
}

func TestReseal(t *testing.T) {
	k := admin(t)
	ns := namespace(t, k)
	srv := cluster.servers[0]
	reseal := func(o store.ResealOptions) (store.Usage, int) {
		t.Helper()
		u, n, err := srv.Reseal(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		return u, n
	}
	reseal(store.ResealOptions{Write: true}) // what other tests left
	before, _ := reseal(store.ResealOptions{})
	ring, _ := cluster.keys.Ring()
	old := ring.Primary()
	const sealed, plain = 250, 3 // more than one page
	for i := range sealed {
		makeSecret(t, k, ns, fmt.Sprintf("s%d", i))
	}
	var keys []string
	for i := range plain {
		keys = append(keys, plainSecret(t, ns, fmt.Sprintf("p%d", i)))
	}
	readSecret(t, k, ns, "p0") // earlier data works
	lease, err := cluster.store.Grant(t.Context(), 600)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := raw(t, keys[2])
	if _, err := cluster.store.KV.Put(t.Context(), keys[2], string(b), clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
	if u, n := reseal(store.ResealOptions{}); n != 0 || u.Plain != plain || u.Stale != plain || u.ByKey[old] != before.ByKey[old]+sealed {
		t.Errorf("before: %+v, %d written, want %d plain and %d by %s", u, n, plain, before.ByKey[old]+sealed, old)
	}
	now := cluster.keys.set(t, rotate(t)).Primary()
	all := before.ByKey[old] + sealed + plain
	if u, n := reseal(store.ResealOptions{}); n != 0 || u.Stale != all {
		t.Errorf("after the rotation: %+v, %d written, want %d stale", u, n, all)
	}
	// An end in the middle: what was done stays done.
	ctx, cancel := context.WithCancel(t.Context())
	_, part, err := srv.Reseal(ctx, store.ResealOptions{Write: true, Progress: func(store.Usage, int) { cancel() }})
	if !errors.Is(err, context.Canceled) || part == 0 || part >= all {
		t.Fatalf("interrupted: %d of %d written, %v", part, all, err)
	}
	pages := 0
	u, n := reseal(store.ResealOptions{Write: true, Progress: func(store.Usage, int) { pages++ }})
	if n != all-part || u.Stale != 0 || u.ByKey[now] != all || len(u.ByKey) != 1 || pages < 2 {
		t.Errorf("resumed: %+v, %d written in %d pages, want the other %d, all %d by %s", u, n, pages, all-part, all, now)
	}
	if u, n := reseal(store.ResealOptions{Write: true, All: true}); n != 0 || u.Stale != 0 || u.Revisions[cluster.store.Client] == 0 {
		t.Errorf("again: %+v, %d written", u, n)
	}
	r, err := cluster.store.KV.Get(t.Context(), keys[2])
	if err != nil || r.Kvs[0].Lease != int64(lease.ID) || !bytes.HasPrefix(r.Kvs[0].Value, []byte(encrypt.Prefix)) {
		t.Errorf("the value with a lease: %v, %v", r, err)
	}
	readSecret(t, k, ns, "p2")
	// Nothing needs the old key any more.
	cluster.keys.set(t, func(r keyring.Ring) (keyring.Ring, error) { return r.Drop(old) })
	if l, err := k.CoreV1().Secrets(ns).List(t.Context(), metav1.ListOptions{}); err != nil || len(l.Items) != sealed+plain {
		t.Errorf("%d Secrets, %v", len(l.Items), err)
	}
}

func TestTransformers(t *testing.T) {
	configMaps := schema.GroupResource{Resource: "configmaps"}
	ring, err := keyring.New(rand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	ctx, at, text := t.Context(), value.DefaultContext("/registry/configmaps/a/b"), []byte("k8s\x00 an object")
	with := encrypt.New(&memoryKeys{ring: ring}, configMaps).TransformerForResource(configMaps)
	without := encrypt.New(&memoryKeys{ring: ring}).TransformerForResource(configMaps)
	sealed, err := with.TransformToStorage(ctx, text, at)
	if err != nil || !bytes.HasPrefix(sealed, []byte(encrypt.Prefix)) {
		t.Fatalf("%q, %v", sealed, err)
	}
	if b, err := without.TransformToStorage(ctx, text, at); err != nil || !bytes.Equal(b, text) {
		t.Errorf("not to be sealed: %q, %v", b, err)
	}
	for name, c := range map[string]struct {
		t     value.Transformer
		in    []byte
		stale bool
	}{"sealed": {with, sealed, false}, "plain": {with, text, true}, "sealed, not to be": {without, sealed, true}, "plain, to be": {without, text, false}} {
		if b, stale, err := c.t.TransformFromStorage(ctx, c.in, at); err != nil || !bytes.Equal(b, text) || stale != c.stale {
			t.Errorf("%s: %q, stale %v, %v; want stale %v", name, b, stale, err, c.stale)
		}
	}
	if _, _, err := without.TransformFromStorage(ctx, []byte("k8s:enc:aesgcm:v1:x"), at); err == nil {
		t.Error("a value of another provider was taken for plain")
	}

	// A ring that lacks the key asks for it, and says so when nobody has it.
	lacking := &memoryKeys{}
	lacking.set(t, rotate(t))
	read := encrypt.New(lacking, configMaps).TransformerForResource(configMaps)
	if _, _, err := read.TransformFromStorage(ctx, sealed, at); err == nil || !strings.Contains(err.Error(), ring.Primary()) {
		t.Errorf("without the key: %v, want an error that names it", err)
	}
	if _, err := encrypt.New(&memoryKeys{}, configMaps).TransformerForResource(configMaps).TransformToStorage(ctx, text, at); !errors.Is(err, keyring.ErrNone) {
		t.Errorf("an empty ring: %v, want a refusal", err)
	}
	lacking.other = ring
	if b, _, err := read.TransformFromStorage(ctx, sealed, at); err != nil || !bytes.Equal(b, text) || len(lacking.asked) != 2 || lacking.asked[1] != ring.Primary() {
		t.Errorf("after asking %v: %q, %v", lacking.asked, b, err)
	}
}

func FuzzKeyOf(f *testing.F) {
	f.Add([]byte(encrypt.Prefix + "\x0a\x01x\x12\x03abc"))
	f.Add([]byte(encrypt.Prefix))
	f.Add([]byte("k8s\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := encrypt.KeyOf(b)
		if err == nil && id != "" && !bytes.Contains(b, []byte(id)) {
			t.Fatalf("%q names key %q", b, id)
		}
	})
}
