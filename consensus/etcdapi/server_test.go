package etcdapi_test

import (
	"context"
	"crypto/tls"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
)

// secured is served with mutual TLS.
func secured(n int, c *host.Config) {
	fast(n, c)
	c.Etcd = host.EtcdConfig{Addresses: []string{"127.0.0.1"}, TLS: c.ServerTLS}
}

func dialTLS(t *testing.T, addr string, c *tls.Config) *clientv3.Client {
	t.Helper()
	cl, err := clientv3.New(clientv3.Config{Endpoints: []string{addr}, TLS: c, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cl.Close() })
	return cl
}

// Administrators use the store, and nobody else; each shard's endpoint keeps what is
// the shard's.
func TestWhoMayDoWhatWhere(t *testing.T) {
	c := storetest.New(t, 1, secured)
	c.Voters(1)
	n := c.Nodes[0]
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	admin := c.ClientTLS(n, "admin", "dev", "system:masters")
	system, pods := dialTLS(t, endpointOf(t, n, "system"), admin), dialTLS(t, endpointOf(t, n, "pods"), admin)
	for key, at := range map[string]*clientv3.Client{"a": system, "/registry/secrets/x": system, "/registry/pods/ns/x": pods} {
		other, shard := pods, "system"
		if at == pods {
			other, shard = system, "pods"
		}
		if _, err := at.Put(ctx, key, "x"); err != nil {
			t.Errorf("%s: %v", key, err)
		}
		for what, f := range map[string]func() error{
			"get":    func() error { _, err := other.Get(ctx, key); return err },
			"put":    func() error { _, err := other.Put(ctx, key, "y"); return err },
			"delete": func() error { _, err := other.Delete(ctx, key); return err },
			"compare": func() error {
				_, err := other.Txn(ctx).If(clientv3.Compare(clientv3.Version(key), "=", 0)).Commit()
				return err
			},
			"nested": func() error {
				_, err := other.Txn(ctx).Then(clientv3.OpTxn(nil, nil, []clientv3.Op{clientv3.OpPut(key, "y")})).Commit()
				return err
			},
			"watch": func() error { r := <-other.Watch(ctx, key); return r.Err() },
		} {
			if err := f(); err == nil || !strings.Contains(err.Error(), "kept by shard "+shard) {
				t.Errorf("%s %s at another shard: %v", what, key, err)
			}
		}
	}
	// A range over shards is the part of it that is here; some keys are everybody's.
	if r, err := pods.Get(ctx, "/", clientv3.WithPrefix()); err != nil || r.Count != 1 {
		t.Errorf("%v %v", r, err)
	}
	for _, key := range []string{"compact_rev_key", "/registry/health", "health", "/registry/pods"} {
		if _, err := pods.Get(ctx, key); err != nil {
			t.Errorf("%s: %v", key, err)
		}
	}

	node := dialTLS(t, endpointOf(t, n, "system"), c.ClientTLS(n, "system:node:n1", "system:nodes"))
	_, err := node.Get(ctx, "a")
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "system:masters") {
		t.Errorf("a node reads the store: %v", err)
	}
	if r := <-node.Watch(ctx, "a"); r.Err() == nil {
		t.Error("a node watches the store")
	}
	none := admin.Clone()
	none.Certificates = nil
	stranger := c.ClientTLS(n, "admin", "system:masters")
	stranger.Certificates = storetest.New(t, 1, nil).ClientTLS(n, "admin", "system:masters").Certificates
	for what, cfg := range map[string]*tls.Config{"without a certificate": none, "with one of another CA": stranger} {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		if _, err := dialTLS(t, endpointOf(t, n, "system"), cfg).Get(ctx, "a"); err == nil {
			t.Errorf("a client %s reads the store", what)
		}
		cancel()
	}
}
