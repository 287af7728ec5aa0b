package store

import (
	"context"
	"fmt"
	"net"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	etcdversion "go.etcd.io/etcd/api/v3/version"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/proxy/grpcproxy"
	"go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/server/egressselector"
	"k8s.io/apiserver/pkg/storage/storagebackend"
)

// Bridge serves a client's keys as etcd over in-memory pipes, for upstream's node port allocator,
// which dials by itself: its constructor takes the address of an etcd and no client. One bitmap is
// read and written through it, when a Service of type NodePort comes or goes.
type Bridge struct {
	listener *bufconn.Listener
	server   *grpc.Server
	done     sync.WaitGroup
}

// NewBridge starts serving c. Close ends it.
func NewBridge(c *clientv3.Client) *Bridge {
	kv, _ := grpcproxy.NewKvProxy(c)
	b := &Bridge{listener: bufconn.Listen(64 << 10), server: grpc.NewServer()}
	pb.RegisterKVServer(b.server, kv)
	pb.RegisterMaintenanceServer(b.server, &status{})
	b.done.Add(1)
	go func() {
		defer b.done.Done()
		_ = b.server.Serve(b.listener) // ends with an error that says Close was called
	}()
	return b
}

// Close cuts all pipes and waits for the server to end.
func (b *Bridge) Close() {
	b.server.Stop()
	b.done.Wait()
}

func (b *Bridge) transport() storagebackend.TransportConfig {
	return storagebackend.TransportConfig{
		// Never resolved: the dialer below ignores it.
		ServerList:     []string{"http://in-process:2379"},
		TracerProvider: noop.NewTracerProvider(),
		EgressLookup: func(egressselector.NetworkContext) (utilnet.DialFunc, error) {
			return func(ctx context.Context, _, addr string) (net.Conn, error) {
				c, err := b.listener.DialContext(ctx)
				if err != nil {
					return nil, fmt.Errorf("in-process store: %w", err)
				}
				return c, nil
			}, nil
		},
	}
}

// status answers the one question that upstream asks each endpoint: its version.
type status struct {
	pb.UnimplementedMaintenanceServer
}

func (*status) Status(context.Context, *pb.StatusRequest) (*pb.StatusResponse, error) {
	return &pb.StatusResponse{Header: &pb.ResponseHeader{}, Version: etcdversion.Version}, nil
}
