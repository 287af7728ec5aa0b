//go:build storetools

package tools

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	etcdclient "go.etcd.io/etcd/client/v3/kubernetes"
	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/apis/example"
	examplev1 "k8s.io/apiserver/pkg/apis/example/v1"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/etcd3"
	"k8s.io/apiserver/pkg/storage/value/encrypt/identity"

	"skein.io/skein/node/api/store/fanout"
)

// fanOn makes a fan-out on the shard of pods as one node has it: no other is asked when that one cannot answer, as in a daemon.
func fanOn(t *testing.T, s *store, n *node) *fanout.Fan {
	t.Helper()
	cert, key := s.ca.issue(t, "kube-apiserver", "system:masters")
	pair, err := tls.LoadX509KeyPair(cert, key)
	must(t, err)
	ca, err := os.ReadFile(s.ca.path("ca.crt"))
	must(t, err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	client, err := etcdclient.New(clientv3.Config{Endpoints: []string{fmt.Sprintf("https://127.0.0.1:%d", n.etcd+1)}, Logger: zap.NewNop(), DialTimeout: 10 * time.Second,
		TLS: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool}})
	must(t, err)
	t.Cleanup(func() { client.Close() })
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, metav1.SchemeGroupVersion)
	must(t, example.AddToScheme(scheme))
	must(t, examplev1.AddToScheme(scheme))
	codec := serializer.NewCodecFactory(scheme).LegacyCodec(examplev1.SchemeGroupVersion)
	newPod := func() runtime.Object { return &example.Pod{} }
	gr, v, tr := schema.GroupResource{Resource: "pods"}, storage.APIObjectVersioner{}, identity.NewEncryptCheckTransformer()
	plain, err := etcd3.New(client, nil, codec, newPod, func() runtime.Object { return &example.PodList{} }, "/registry", "/pods", gr, tr,
		etcd3.NewDefaultLeaseManagerConfig(), etcd3.NewDefaultDecoder(codec, v), v)
	must(t, err)
	t.Cleanup(plain.Close)
	f, err := fanout.New(context.Background(), fanout.Config{Storage: plain, Client: client.Client, Codec: codec, Transformer: tr, Resource: gr,
		PathPrefix: "/registry", ResourcePrefix: "/pods", New: newPod, Patience: time.Minute})
	must(t, err)
	t.Cleanup(f.Close)
	return f
}

// A leader dies and another is elected, twice; those who watch through a follower's fan-out miss nothing and are told nothing twice.
func TestFanOutThroughChangesOfLeader(t *testing.T) {
	s := startStore(t)
	lead := s.leads("pods")
	f := fanOn(t, s, s.nodes[(slices.Index(s.nodes, lead)+1)%3])
	write := func(i int) (rev string) {
		p := &example.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: fmt.Sprint("p", i)}}
		until(t, "create "+p.Name, 30*time.Second, func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			out := &example.Pod{}
			err := f.Create(ctx, "/pods/a/"+p.Name, p.DeepCopy(), out, 0)
			if storage.IsExist(err) { // an attempt whose answer was lost
				err = f.Get(ctx, "/pods/a/"+p.Name, storage.GetOptions{}, out)
			}
			rev = out.ResourceVersion
			return err
		})
		return rev
	}
	first := write(0)
	const watchers, rounds, each = 20, 2, 30
	want := []string{}
	var mu sync.Mutex // guards got
	got := make([][]string, watchers)
	var wg sync.WaitGroup
	defer wg.Wait()
	for i := range watchers {
		w, err := f.Watch(t.Context(), "/pods/", storage.ListOptions{ResourceVersion: first, Predicate: storage.Everything, Recursive: true})
		must(t, err)
		defer w.Stop()
		wg.Go(func() {
			for e := range w.ResultChan() {
				line := string(e.Type)
				if m, err := meta.Accessor(e.Object); err == nil && e.Type != watch.Error {
					line += " " + m.GetName() + "@" + m.GetResourceVersion()
				}
				mu.Lock()
				got[i] = append(got[i], line)
				mu.Unlock()
			}
			mu.Lock()
			got[i] = append(got[i], "end")
			mu.Unlock()
		})
	}
	n := 0
	for range rounds {
		dead := s.leads("pods")
		if n == 0 || dead != s.nodes[(slices.Index(s.nodes, lead)+1)%3] { // the node with the fan-out has to live
			dead.kill()
		}
		for range each {
			n++
			want = append(want, fmt.Sprintf("ADDED p%s@%s", strconv.Itoa(n), write(n)))
		}
		if dead.cmd == nil {
			s.start(dead)
		}
	}
	until(t, "all is told", 30*time.Second, func() error {
		mu.Lock()
		defer mu.Unlock()
		for i, g := range got {
			if len(g) < len(want) {
				return fmt.Errorf("watcher %d got %d of %d", i, len(g), len(want))
			}
		}
		return nil
	})
	mu.Lock()
	defer mu.Unlock()
	for i, g := range got {
		if !slices.Equal(g, want) {
			t.Errorf("watcher %d: %q\nwant %q", i, g, want)
		}
	}
}
