package store

import (
	"bytes"
	"context"
	cryptorand "crypto/rand"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	etcdclient "go.etcd.io/etcd/client/v3/kubernetes"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/kubernetes/pkg/apis/core"

	"skein.io/skein/consensus/keyring"
	"skein.io/skein/node/api/encrypt"
	"skein.io/skein/node/api/store/rawlist"
)

// oneKey is an etcd with one key.
type oneKey struct {
	clientv3.KV // nil
	key         string
	value       []byte
	rev         int64
}

func (k *oneKey) Get(_ context.Context, key string, _ ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if key != k.key {
		return &clientv3.GetResponse{}, nil
	}
	return &clientv3.GetResponse{Kvs: []*mvccpb.KeyValue{{Key: []byte(key), Value: k.value, ModRevision: k.rev}}}, nil
}

// onePut is how that is written.
type onePut struct {
	etcdclient.Interface // nil
	*oneKey
}

func (p onePut) Get(ctx context.Context, key string, o etcdclient.GetOptions) (etcdclient.GetResponse, error) {
	return p.Interface.Get(ctx, key, o)
}

func (p onePut) OptimisticPut(_ context.Context, key string, value []byte, rev int64, _ etcdclient.PutOptions) (etcdclient.PutResponse, error) {
	if key != p.key || rev != p.rev {
		return etcdclient.PutResponse{}, nil
	}
	p.value, p.rev = value, rev+1
	return etcdclient.PutResponse{Succeeded: true, Revision: p.rev}, nil
}

type oneRing struct{ ring keyring.Ring }

func (r *oneRing) Ring() (keyring.Ring, <-chan struct{}) { return r.ring, nil }
func (r *oneRing) Fetch(context.Context, string) error   { return context.Canceled }
func (r *oneRing) rotate(t *testing.T) {
	t.Helper()
	k, err := keyring.NewKey(cryptorand.Reader, time.Now())
	if err == nil {
		r.ring, err = r.ring.Add(k)
	}
	if err == nil {
		r.ring, err = r.ring.Use(k.ID)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A pod that is sealed at rest is bound in its bytes as well: they are opened and sealed anew, for its key. What an older key sealed, or was sealed for another
// place, is left to upstream.
func TestBindSealed(t *testing.T) {
	ring, err := keyring.New(cryptorand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pods, keys := schema.GroupResource{Resource: "pods"}, &oneRing{ring}
	seal := encrypt.New(keys, pods).TransformerForResource(pods)
	at := "/registry/pods/ns/p"
	fill, rnd := randomPods(t)
	codec, ctx := podCodec(), t.Context()
	bound := 0
	for range 300 {
		p := somePod(fill, rnd)
		before, err := runtime.Encode(codec, p)
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := seal.TransformToStorage(ctx, before, keyContext(at))
		if err != nil {
			t.Fatal(err)
		}
		etcd := &oneKey{key: at, value: sealed, rev: 7}
		s := binds{client: &etcdclient.Client{Client: &clientv3.Client{KV: etcd}, Kubernetes: onePut{oneKey: etcd}}, prefix: "/registry/", resource: "/pods",
			config: &storagebackend.ConfigForResource{Config: storagebackend.Config{Codec: codec, Transformer: seal}, GroupResource: pods}}
		b := &core.Binding{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns", UID: p.UID}, Target: core.ObjectReference{Kind: "Node", Name: "node-of-the-test"}}
		want := func(at time.Time) []byte {
			out, _ := rawlist.Bind(before, rawlist.Binding{UID: string(b.UID), Node: b.Target.Name, At: metav1.NewTime(at)})
			return out
		}
		first := want(time.Now())
		done, err := s.bind(ctx, "/pods/ns/p", b, "7")
		last := want(time.Now())
		if err != nil || done != (last != nil) {
			t.Fatalf("bound %v, %v; plain it is %v", done, err, last != nil)
		}
		if !done {
			continue
		}
		bound++
		opened, _, err := seal.TransformFromStorage(ctx, etcd.value, keyContext(at))
		if err != nil || !bytes.Equal(opened, first) && !bytes.Equal(opened, last) {
			t.Fatalf("it opens to %q, %v, want %q", opened, err, last)
		}
		if !bytes.HasPrefix(etcd.value, []byte(encrypt.Prefix)) || bytes.Contains(etcd.value, []byte("node-of-the-test")) || bytes.Equal(etcd.value, sealed) {
			t.Fatalf("stored as %q", etcd.value)
		}
		if bound > 1 {
			continue
		}
		for what, change := range map[string]func(){
			"a newer version":               func() { etcd.rev = 8 },
			"sealed for another place":      func() { etcd.value, err = seal.TransformToStorage(ctx, before, keyContext(at+"x")) },
			"not sealed though it is to be": func() { etcd.value = before },
			"sealed by an older key":        func() { keys.rotate(t) },
		} {
			etcd.value, etcd.rev = sealed, 7
			if change(); err != nil {
				t.Fatal(err)
			}
			was := bytes.Clone(etcd.value)
			if done, err := s.bind(ctx, "/pods/ns/p", b, "7"); done || err != nil || !bytes.Equal(etcd.value, was) {
				t.Errorf("%s: bound %v, %v", what, done, err)
			}
		}
	}
	if bound < 100 {
		t.Errorf("only %d pods were bound", bound)
	}
}
