package api

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apiserver/pkg/authentication/user"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/controlplane/controller/clusterauthenticationtrust"
	"k8s.io/kubernetes/pkg/controlplane/controller/defaultservicecidr"
	"k8s.io/kubernetes/pkg/controlplane/controller/legacytokentracking"
	"k8s.io/kubernetes/pkg/controlplane/controller/systemnamespaces"
	"k8s.io/kubernetes/pkg/serviceaccount"
	"skein.io/skein/node/api/kinds"
)

// bootstrapRetry is the pause between attempts to write what every cluster has. The store has a
// leader nearly always; another replica may be writing the same.
const bootstrapRetry = 250 * time.Millisecond

// worrying is the attempt after which a failure is logged: some 5 s.
const worrying = 20

// addHooks adds what keeps the objects in being that every cluster has. The rest of upstream's
// (RBAC policy, priority classes, flow schemas, address repair) came with the groups.
func (b *build) addHooks(s *genericapiserver.GenericAPIServer) error {
	hooks := map[string]genericapiserver.PostStartHookFunc{
		"start-system-namespaces-controller": func(h genericapiserver.PostStartHookContext) error {
			names := []string{metav1.NamespaceSystem, metav1.NamespacePublic, corev1.NamespaceNodeLease, metav1.NamespaceDefault}
			go systemnamespaces.NewController(names, b.client, b.informers.Core().V1().Namespaces()).Run(h.Done())
			return nil
		},
		// Without it Service addresses cannot be given, and upstream's repair ends the process after a minute.
		"start-kubernetes-service-cidr-controller": func(h genericapiserver.PostStartHookContext) error {
			defaultservicecidr.NewController(kinds.IPNet(b.cfg.ServiceCIDR), kinds.IPNet(b.cfg.SecondServiceCIDR), b.client).Start(h)
			return nil
		},
		"start-cluster-authentication-info-controller": func(h genericapiserver.PostStartHookContext) error {
			go clusterauthenticationtrust.NewClusterAuthenticationTrustController(b.proxy.trust(b.clientCA), b.client).Run(h, 1)
			return nil
		},
		// Since when the use of tokens in Secrets is remembered: the leader deletes those that were not used for long.
		"start-legacy-token-tracking-controller": func(h genericapiserver.PostStartHookContext) error {
			go legacytokentracking.NewController(b.client).Run(h.Done())
			return nil
		},
		// Nodes cannot work without this and the next, so the server is not ready before.
		"node-authorizer-pods": func(h genericapiserver.PostStartHookContext) error {
			go b.nodePods.Feed(h)
			select {
			case <-b.nodePods.synced:
			case <-h.Done():
			}
			return nil
		},
		"bootstrap-tokens": func(h genericapiserver.PostStartHookContext) error {
			b.bootstrap.StartWithContext(h)
			b.bootstrap.WaitForCacheSync(h.Done())
			return nil
		},
		"skein-node-roles": func(h genericapiserver.PostStartHookContext) error {
			b.untilDone(h, "roles of nodes", func(ctx context.Context) error { return ensureBindings(ctx, b.client) })
			return nil
		},
		// Not awaited: after a crash within their creation it may take upstream a minute to free an address.
		"skein-services": func(h genericapiserver.PostStartHookContext) error {
			go b.untilDone(h, "first Services", func(ctx context.Context) error { return ensureServices(ctx, b.client, b.cfg) })
			return nil
		},
	}
	for name, hook := range hooks {
		if err := s.AddPostStartHook(name, hook); err != nil {
			return fmt.Errorf("hook %s: %w", name, err)
		}
	}
	return nil
}

// untilDone repeats do until it succeeds or ctx ends.
func (b *build) untilDone(ctx context.Context, what string, do func(context.Context) error) {
	for try := 1; ; try++ {
		err := do(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		if try == worrying { // the first ones only race with others who start as well
			b.cfg.Logger.Warn("cannot write yet, trying on", "what", what, "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(bootstrapRetry):
		}
	}
}

// patient makes a hook harmless: upstream ends the whole process when a hook returns an error,
// and its hooks do when the store has no quorum for half a minute, or when the server is stopped
// early. A hook that may be called again is, until it succeeds; the others keep trying by themselves.
func (b *build) patient(name string, hook genericapiserver.PostStartHookFunc, again bool) genericapiserver.PostStartHookFunc {
	return func(h genericapiserver.PostStartHookContext) error {
		if look := settled[name]; look != nil {
			if ok, err := look(h, b.client); err == nil && ok {
				return nil
			}
		}
		for {
			err := hook(h)
			if err == nil || h.Err() != nil {
				return nil
			}
			b.cfg.Logger.Warn("start-up of the API takes long", "hook", name, "error", err)
			if !again {
				return nil
			}
			select {
			case <-h.Done():
			case <-time.After(bootstrapRetry):
			}
		}
	}
}

// discoveryRole lets anybody see what the API serves, and the public keys of ServiceAccount tokens: what authentication leaves open to
// anonymous requests (openPaths), which upstream's policy gives to the authenticated and to ServiceAccounts. What is below /apis is not in
// it: see openDiscovery.
const discoveryRole = "skein:public-discovery"

func roles() []rbacv1.ClusterRole {
	return []rbacv1.ClusterRole{{
		ObjectMeta: metav1.ObjectMeta{Name: discoveryRole, Labels: map[string]string{"kubernetes.io/bootstrapping": "rbac-defaults"}},
		Rules: []rbacv1.PolicyRule{{Verbs: []string{"get"},
			NonResourceURLs: []string{"/api", "/api/*", "/apis", serviceaccount.OpenIDConfigPath, serviceaccount.JWKSPath}}},
	}, metricsReader(), whoMayAsk()}
}

// bindings are Skein's additions to upstream's bootstrap policy.
func bindings() []rbacv1.ClusterRoleBinding {
	bind := func(name, role string, s ...rbacv1.Subject) rbacv1.ClusterRoleBinding {
		return rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/bootstrapping": "rbac-defaults"}},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
			Subjects:   s,
		}
	}
	group := func(name string) rbacv1.Subject {
		return rbacv1.Subject{Kind: rbacv1.GroupKind, APIGroup: rbacv1.GroupName, Name: name}
	}
	return []rbacv1.ClusterRoleBinding{
		// The datapath and DNS of a node follow all Services, EndpointSlices and nodes, as kube-proxy does.
		bind("skein:node-proxier", "system:node-proxier", group(user.NodesGroup)),
		// Logs, exec and the like go from here to the agents, who ask who may.
		bind("skein:agent-client", "system:kubelet-api-admin", rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: AgentClientUser}),
		bind(discoveryRole, discoveryRole, group(user.AllUnauthenticated), group(user.AllAuthenticated)),
		bind(whyRole, whyRole, group(user.AllAuthenticated)),
	}
}

// ensureBindings writes them, and the roles that are Skein's own.
func ensureBindings(ctx context.Context, client kubernetes.Interface) error {
	for _, want := range roles() {
		api := client.RbacV1().ClusterRoles()
		have, err := api.Get(ctx, want.Name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			if _, err = api.Create(ctx, &want, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
				err = nil
			}
		case err == nil && !equality.Semantic.DeepEqual(have.Rules, want.Rules):
			have.Rules = want.Rules
			_, err = api.Update(ctx, have, metav1.UpdateOptions{})
		}
		if err != nil {
			return fmt.Errorf("ClusterRole %s: %w", want.Name, err)
		}
	}
	api := client.RbacV1().ClusterRoleBindings()
	for _, want := range bindings() {
		have, err := api.Get(ctx, want.Name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			if _, err := api.Create(ctx, &want, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
				return fmt.Errorf("ClusterRoleBinding %s: %w", want.Name, err)
			}
		case err != nil:
			return fmt.Errorf("ClusterRoleBinding %s: %w", want.Name, err)
		case !equality.Semantic.DeepEqual(have.Subjects, want.Subjects):
			have.Subjects = want.Subjects
			if _, err := api.Update(ctx, have, metav1.UpdateOptions{}); err != nil {
				return fmt.Errorf("ClusterRoleBinding %s: %w", want.Name, err)
			}
		}
	}
	return nil
}

// services are those that pods of every cluster find: the API and DNS. Neither has a selector: the
// endpoints of the first are written by RunLeaderHooks, the second is answered on each node.
func services(cfg *Config) []corev1.Service {
	port := func(name string, proto corev1.Protocol, port int32, target int32) corev1.ServicePort {
		return corev1.ServicePort{Name: name, Protocol: proto, Port: port, TargetPort: intstr.FromInt32(target)}
	}
	make := func(namespace, name string, ip netip.Addr, labels map[string]string, ports ...corev1.ServicePort) corev1.Service {
		none, single := corev1.ServiceAffinityNone, corev1.IPFamilyPolicySingleStack
		return corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
			Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIP: ip.String(), ClusterIPs: []string{ip.String()},
				IPFamilyPolicy: &single, SessionAffinity: none, Ports: ports},
		}
	}
	return []corev1.Service{
		make(metav1.NamespaceDefault, kubernetesService, nthAddr(cfg.ServiceCIDR, 1),
			map[string]string{"component": "apiserver", "provider": "kubernetes"},
			port("https", corev1.ProtocolTCP, 443, int32(cfg.AdvertisePort))),
		make(metav1.NamespaceSystem, "kube-dns", cfg.DNSServiceIP,
			map[string]string{"k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"},
			port("dns", corev1.ProtocolUDP, 53, 53), port("dns-tcp", corev1.ProtocolTCP, 53, 53)),
	}
}

// ensureServices creates the Services that do not exist. Existing ones are the administrator's.
func ensureServices(ctx context.Context, client kubernetes.Interface, cfg *Config) error {
	for _, want := range services(cfg) {
		api := client.CoreV1().Services(want.Namespace)
		_, err := api.Get(ctx, want.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			// Fails as long as another replica, which creates the same, has got no further than the address.
			_, err = api.Create(ctx, &want, metav1.CreateOptions{})
		}
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("Service %s/%s: %w", want.Namespace, want.Name, err)
		}
	}
	return nil
}
