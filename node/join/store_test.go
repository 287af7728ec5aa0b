package join

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
)

// etcd is one real store for all tests of the package, each under a prefix of its own.
var etcd struct {
	sync.Mutex
	server *embed.Etcd
	client *clientv3.Client
	tests  int
}

func TestMain(m *testing.M) {
	code := m.Run()
	if etcd.server != nil {
		etcd.client.Close()
		etcd.server.Close()
		os.RemoveAll(etcd.server.Config().Dir)
	}
	os.Exit(code)
}

// testKV returns an empty store.
func testKV(t *testing.T) clientv3.KV {
	t.Helper()
	etcd.Lock()
	defer etcd.Unlock()
	if etcd.server == nil {
		startEtcd(t)
	}
	etcd.tests++
	return namespace.NewKV(etcd.client, fmt.Sprintf("/test-%d", etcd.tests))
}

func startEtcd(t *testing.T) {
	dir, err := os.MkdirTemp("", "skein-join-etcd-")
	if err != nil {
		t.Fatal(err)
	}
	cfg := embed.NewConfig()
	cfg.Dir, cfg.LogLevel = dir, "error"
	cfg.UnsafeNoFsync = true // nothing here is to survive
	// Any free ports; the client in this process does not even use them.
	anywhere := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls, cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = anywhere, anywhere, anywhere, anywhere
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		os.RemoveAll(dir)
		t.Fatal(err)
	}
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(30 * time.Second):
		server.Close()
		os.RemoveAll(dir)
		t.Fatal("etcd did not start")
	}
	etcd.server, etcd.client = server, v3client.New(server.Server)
}

// brokenKV is a store without a leader.
type brokenKV struct{ clientv3.KV }

func (brokenKV) Get(context.Context, string, ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	return nil, fmt.Errorf("etcdserver: no leader")
}
