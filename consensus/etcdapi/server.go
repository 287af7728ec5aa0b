package etcdapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
	"unicode/utf8"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"skein.io/skein/consensus/shard"
)

const (
	// maxReceive is the largest message that a client may send: etcd's limit of a
	// request, 1.5 MiB, with its overhead of 512 KiB.
	maxReceive = (1536 + 512) << 10
	// maxTxnOps is the largest number of operations in a branch of a client's
	// transaction; etcd's default.
	maxTxnOps = 128
	// Pings that clients may send, and those that find dead ones; etcd's defaults.
	clientPings = 5 * time.Second
	serverPings = 2 * time.Hour
	pingTimeout = 20 * time.Second
	// streamWorkers keep their grown stacks from one request to the next; growing one
	// took a twentieth of a read. When all are busy, gRPC starts more goroutines.
	streamWorkers = 32
	// Receive windows in bytes, large enough for any request. Fixed ones spare the
	// pings with which gRPC would measure what they should be.
	streamWindow = 1 << 20
	connWindow   = 4 << 20
)

// ServerOptions of a gRPC server.
type ServerOptions struct {
	// TLS terminates the connections; it must demand and verify certificates. nil:
	// neither encrypted nor authenticated, which only tests want.
	TLS *tls.Config
	// Authorize decides whether the bearer of a verified certificate may use the
	// store; its error is told to the client. Used with TLS alone, and required then.
	Authorize func(*x509.Certificate) error
	// Shards is the table: keys of other shards are refused.
	Shards shard.Table
	// Progress is NewWatch's.
	Progress time.Duration
}

// NewServer returns a gRPC server of all of etcd's services for a replica. Its
// streams end and its requests fail when the replica stops, with errors that make
// clients go to another endpoint. Who serves it stops it.
func NewServer(r Replica, o ServerOptions) *grpc.Server {
	g := guard{r: r, o: o}
	opts := []grpc.ServerOption{
		grpc.ForceServerCodecV2(codec{}),
		grpc.ChainUnaryInterceptor(g.unary), grpc.ChainStreamInterceptor(g.stream),
		grpc.MaxRecvMsgSize(maxReceive), grpc.MaxSendMsgSize(math.MaxInt32), grpc.MaxConcurrentStreams(math.MaxUint32),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: clientPings}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: serverPings, Timeout: pingTimeout}),
		grpc.NumStreamWorkers(streamWorkers), grpc.InitialWindowSize(streamWindow), grpc.InitialConnWindowSize(connWindow),
	}
	if o.TLS != nil {
		opts = append(opts, grpc.Creds(credentials.NewTLS(o.TLS)))
	}
	s := grpc.NewServer(opts...)
	keys := &keyGuard{o.Shards, r.Shard()}
	pb.RegisterKVServer(s, guardedKV{NewKV(r), keys})
	pb.RegisterWatchServer(s, &watchServer{r: r, progress: o.Progress, keys: keys})
	pb.RegisterLeaseServer(s, NewLease(r))
	pb.RegisterMaintenanceServer(s, NewMaintenance(r))
	pb.RegisterClusterServer(s, NewCluster(r))
	pb.RegisterAuthServer(s, NewAuth(r))
	healthpb.RegisterHealthServer(s, &healthServer{r: r})
	return s
}

// guard lets in who may use the store, and says what etcd says before a call.
type guard struct {
	r Replica
	o ServerOptions
}

func (g guard) unary(ctx context.Context, q any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	if err := g.check(ctx); err != nil {
		return nil, err
	}
	resp, err := handle(ctx, q)
	if errors.Is(err, rpctypes.ErrGRPCNoSpace) {
		// Clients know etcd's error by its text; ours, in process, says more.
		err = rpctypes.ErrGRPCNoSpace
	}
	return resp, err
}

func (g guard) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	if err := g.check(ss.Context()); err != nil {
		return err
	}
	return handle(srv, ss)
}

func (g guard) check(ctx context.Context) error {
	if g.o.TLS != nil {
		if err := g.authorize(ctx); err != nil {
			return status.Error(codes.PermissionDenied, "skein: "+err.Error())
		}
	}
	if v := metadata.ValueFromIncomingContext(ctx, rpctypes.MetadataClientAPIVersionKey); len(v) > 0 && !utf8.ValidString(v[0]) {
		return rpctypes.ErrGRPCInvalidClientAPIVersion
	}
	if clientRequiresLeader(ctx) {
		if leader, _ := g.r.Leader(); leader == 0 {
			return rpctypes.ErrGRPCNoLeader
		}
	}
	return nil
}

func (g guard) authorize(ctx context.Context) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return fmt.Errorf("the client is unknown")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return fmt.Errorf("the client shows no verified certificate")
	}
	return g.o.Authorize(info.State.VerifiedChains[0][0])
}

// AdminsGroup is the organisation in the certificates of those who may do anything.
const AdminsGroup = "system:masters"

// Admins is the Authorize that lets administrators in and nobody else: whoever
// reads and writes the store is above every rule of the API.
func Admins(cert *x509.Certificate) error {
	if slices.Contains(cert.Subject.Organization, AdminsGroup) {
		return nil
	}
	return fmt.Errorf("the store is open to client certificates with the organisation %s alone; this one is of %q", AdminsGroup, cert.Subject)
}
